"""On a GPU: scores, greedy completions and fp32 training are the CPU's but for rounding; frozen and resumed to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_examples, make_tiny_model, make_tiny_policy, make_tiny_tokenizer
from safetensors.torch import load_file, save_file
from tiny_training import settings, train, train_interrupted

from lorapar_utils import evaluation
from lorapar_utils.importance import score_importance

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
DEVICE = "cuda"
STAGES = pytest.mark.parametrize("stage", ["sft", "grpo"])


def adapter(model):
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_scores_are_those_of_the_cpu():
    expected = score_importance(make_tiny_model(), make_tiny_examples(), batch_size=4)
    found = score_importance(make_tiny_model().to(DEVICE), make_tiny_examples(), batch_size=4)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-7)


def test_scores_of_a_bf16_base_are_near_those_of_one_example_at_a_time_in_fp32():
    model = make_tiny_model(torch.bfloat16).to(DEVICE)
    exact = score_importance(model, make_tiny_examples(), batch_size=1, in_batches=False)
    found = score_importance(model, make_tiny_examples(), batch_size=4)
    error = sum((found[name] - values).square().sum() for name, values in exact.items())
    assert 0 < error.sqrt() < 0.05 * sum(values.square().sum() for values in exact.values()).sqrt()


def test_greedy_and_drawn_completions_are_those_of_the_cpu():
    prompts = ["1 + 2", "2 + 2", "3 + 1", "1", "2 + 3", "1 + 1 + 1", "3"]
    chosen = settings().changed(evaluation={"batch_size": 4, "max_new_tokens": 9})
    for samples in (0, 3):
        found, expected = (
            evaluation.generate(model.eval(), make_tiny_tokenizer(), prompts, chosen, samples=samples)
            for model in (make_tiny_policy().to(DEVICE), make_tiny_policy())
        )
        assert found == expected


@STAGES
def test_fp32_training_is_the_cpus(stage, tmp_path):
    # A process of its own: where there is a GPU, trainers take it.
    script = f"import test_gpu; test_gpu.train_and_save({stage!r}, {str(tmp_path / 'cpu')!r})"
    where = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", script], env=os.environ | where, check=True)
    model, _, _ = train(stage, model=make_tiny_policy().to(DEVICE))
    found, before = adapter(model), adapter(make_tiny_policy())
    for name, values in load_file(tmp_path / "cpu").items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-5)
        assert torch.equal(found[name], before[name]) == torch.equal(values, before[name])


def train_and_save(stage, file):
    model, _, _ = train(stage)
    save_file(adapter(model), file)


@STAGES
def test_a_stage_that_is_interrupted_ends_as_if_it_had_not_been(stage, tmp_path):
    straight, _, _ = train(stage, model=make_tiny_policy(torch.bfloat16).to(DEVICE))
    train_interrupted(stage, tmp_path, make_tiny_policy(torch.bfloat16).to(DEVICE))
    again, _, _ = train(stage, tmp_path, model=make_tiny_policy(torch.bfloat16).to(DEVICE))
    expected = adapter(straight)
    assert all(torch.equal(values, expected[name]) for name, values in adapter(again).items())


@STAGES
def test_bf16_training_leaves_every_bit_of_the_others(stage):
    model = make_tiny_policy(torch.bfloat16).to(DEVICE)
    before = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    model, masks, _ = train(stage, model=model)
    for name, after in model.named_parameters():
        after, mask = after.detach().cpu(), masks.get(name, torch.zeros(after.shape, dtype=torch.bool))
        assert torch.equal(after[~mask], before[name][~mask]), name
        if mask.any():
            assert after.dtype == torch.float32 and not torch.equal(after[mask], before[name][mask]), name
