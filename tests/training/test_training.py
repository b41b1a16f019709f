"""Both stages on a tiny LLaMA with TRL's real trainers: what is frozen, what resumes, and what TRL itself computes."""

import io
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import pandas as pd
import pytest
import torch
from conftest import make_tiny_policy, make_tiny_tokenizer
from tiny_training import examples, settings, sparse_masks, train, train_interrupted, weights_hash
from trl import GRPOConfig

from lorapar_utils import training
from lorapar_utils.errors import InputError
from lorapar_utils.fast import completions
from lorapar_utils.fast.grpo_trainer import LeanGRPOTrainer
from lorapar_utils.training import callbacks, checkpoints, rewards, rollouts, stages

STEPS = {"sft": 9, "grpo": 6}


@pytest.mark.parametrize("four_bits", [False, True], ids=["whole base", "4-bit base"])
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_stage_changes_active_elements_and_leaves_every_bit_of_the_others(stage, four_bits):
    model = make_tiny_policy()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if four_bits:
        # What TRL goes by: over such a base it would round every adapter to bf16. Counting its weights needs bitsandbytes.
        model.get_base_model().is_loaded_in_4bit = True
        model.get_base_model().num_parameters = lambda **_: 0
    model, masks, history = train(stage, model=model)
    assert len(history) == STEPS[stage]
    for name, after in model.named_parameters():
        mask = masks.get(name, torch.zeros(after.shape, dtype=torch.bool))
        assert after.dtype == torch.float32 and torch.equal(after[~mask], before[name][~mask]), name
        if mask.any():
            assert not torch.equal(after[mask], before[name][mask]), name
    if stage == "grpo":
        assert any(entry["reward_std"] > 0 for entry in history)


def run_until_killed(stage, folder, moment, results):
    """Train; die by SIGKILL at `moment`, or put the end's hash into `results`."""
    torch.set_num_threads(1)
    sys.stderr = io.StringIO()
    if moment is not None:
        threading.Thread(target=kill_this_process, args=(folder, *moment), daemon=True).start()
    model, _, history = train(stage, folder)
    results.put((weights_hash(model), len(history)))
    results.close()
    results.join_thread()
    os._exit(0)


def kill_this_process(folder, step, seconds):
    """`seconds` after the checkpoint of `step` is begun (0: after training is set up), so at any point of a step."""
    begun = folder / f"checkpoint-{step}" if step else folder
    while not begun.exists():
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_stage_killed_at_random_moments_ends_as_if_it_had_not_been(stage, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lorapar_utils.training.stages", "conftest"])

    def run(folder, moment=None):
        results = context.Queue()
        process = context.Process(target=run_until_killed, args=(stage, folder, moment, results))
        process.start()
        process.join(120)
        return process.exitcode, (results.get(timeout=5) if process.exitcode == 0 else None)

    code, straight = run(tmp_path / "straight")
    assert code == 0 and straight[1] == STEPS[stage]
    began = time.perf_counter()
    assert run(tmp_path / "again") == (0, straight)
    a_step = (time.perf_counter() - began) / STEPS[stage]
    moments = random.Random(0)
    killed = resumed = 0
    for trial in range(5):
        folder = tmp_path / f"trial{trial}"
        code, found = run(folder, (trial % (STEPS[stage] // 2) * 2, moments.uniform(0, a_step)))
        killed += code == -signal.SIGKILL
        if code != 0:
            resumed += bool(checkpoints.finished_checkpoints(folder))
            code, found = run(folder)
        assert code == 0 and found == straight
    assert killed >= 3 and resumed >= 1


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_stage_killed_after_its_last_checkpoint_trains_no_step_more(stage, tmp_path):
    model, _, history = train(stage, tmp_path)
    assert checkpoints.finished_checkpoints(tmp_path)[-1].name == f"checkpoint-{STEPS[stage]}"
    again, _, read_back = train(stage, tmp_path)
    assert weights_hash(again) == weights_hash(model) and read_back == history
    # Nor do the hooks of the stage's optimizer outlive it.
    assert not any(p._backward_hooks for p in again.parameters())


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_stage_that_is_interrupted_by_hand_goes_on_in_the_same_kernel(stage, tmp_path):
    straight, _, _ = train(stage)
    train_interrupted(stage, tmp_path)
    assert [path.name for path in checkpoints.finished_checkpoints(tmp_path)] == ["checkpoint-2"]
    again, _, _ = train(stage, tmp_path)
    assert weights_hash(again) == weights_hash(straight)


def test_a_stage_leaves_no_checkpointing_of_activations_to_the_next():
    model, _, _ = train("sft", sft={"gradient_checkpointing": True})
    assert model.get_base_model().is_activation_checkpointing
    train("grpo", model=model)
    assert not model.get_base_model().is_activation_checkpointing


def test_curves_are_drawn_while_a_stage_trains_and_change_nothing(monkeypatch):
    drawings = []

    class Handle:
        def update(self, shown):
            drawings.append(shown)

    monkeypatch.setattr(callbacks, "get_ipython", lambda: True)
    monkeypatch.setattr(callbacks, "display", lambda *shown, display_id: Handle())
    monkeypatch.setattr(callbacks.Curve, "SECONDS", 0)
    model, _, history = train("sft", watch=lambda: {"validation/system1": 0.5}, show_curves=True)
    *figures, last = drawings
    assert len(figures) == max(row["step"] for row in history) and last.data == ""
    loss, validation = (axes.lines[0].get_xydata() for axes in figures[-1].axes)
    assert loss.tolist() == [[row["step"], row["loss"]] for row in history if "loss" in row][: len(loss)]
    assert len(loss) >= len(figures) - 1 and set(validation[:, 1]) == {0.5}
    plain, _, _ = train("sft", watch=lambda: {"validation/system1": 0.5})
    assert weights_hash(model) == weights_hash(plain)


def test_outside_a_notebook_curves_are_not_asked_for(capsys):
    train("sft", show_curves=True)
    assert "HTML" not in capsys.readouterr().out


def test_completions_are_shown_with_their_rewards_after_each_step_and_change_nothing(monkeypatch, capsys):
    plain, _, _ = train("grpo")
    printed, _, _ = train("grpo", show_rollouts=2)
    heads = re.findall(r"^ *step +prompt +completion.*advantage$", capsys.readouterr().out, re.M)
    assert len(heads) == STEPS["grpo"] and weights_hash(printed) == weights_hash(plain)

    tables = []
    monkeypatch.setattr(callbacks, "get_ipython", lambda: True)
    handle = types.SimpleNamespace(update=tables.append)
    monkeypatch.setattr(callbacks, "display", lambda *shown, display_id: handle)
    train("grpo", show_rollouts=2)
    assert [set(table.data["step"]) for table in tables] == [{step + 1} for step in range(STEPS["grpo"])]
    assert len(tables[0].data) == 2 and "&lt;" in callbacks.Completions._table(pd.DataFrame({"a": ["<b>"]})).to_html()


def test_nothing_is_reported_to_the_hub():
    script = "import lorapar_utils.training; from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB")}
    done = subprocess.run([sys.executable, "-c", script], env=quiet, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "True"


def test_a_checkpoint_that_was_cut_off_is_not_resumed_from(tmp_path):
    model, _, _ = train("sft", tmp_path)
    for mark in tmp_path.glob("checkpoint-*/finished"):
        mark.unlink()
    again, _, history = train("sft", tmp_path)
    assert weights_hash(again) == weights_hash(model) and len(history) == STEPS["sft"]


def test_a_checkpoint_that_was_damaged_is_named_and_the_one_before_it_counts(tmp_path, capsys):
    model, _, _ = train("sft", tmp_path / "whole")
    names = {"optimizer.pt": "cut off", "scheduler.pt": "overwritten", "rng_state.pth": "taken away"}
    for name, how in names.items():
        folder = shutil.copytree(tmp_path / "whole", tmp_path / name)
        [_, last] = checkpoints.finished_checkpoints(folder)
        damage(last / name, how)
        again, _, history = train("sft", folder)
        assert f"{last} is damaged ({name}) and deleted" in capsys.readouterr().out
        assert weights_hash(again) == weights_hash(model) and len(history) == STEPS["sft"]
    for checkpoint in checkpoints.finished_checkpoints(tmp_path / "whole"):
        damage(checkpoint / "adapter_model.safetensors", "overwritten")
    from_the_start, _, history = train("sft", tmp_path / "whole")
    assert capsys.readouterr().out.count("is damaged (adapter_model.safetensors)") == 2
    assert weights_hash(from_the_start) == weights_hash(model) and len(history) == STEPS["sft"]


def damage(path, how):
    content = path.read_bytes()
    if how == "taken away":
        path.unlink()
    else:
        half = len(content) // 2
        path.write_bytes(content[:half] + bytes(len(content) - half) * (how == "overwritten"))


def test_advantages_are_those_that_chapter_4_computes(monkeypatch):
    """The reward less the mean of the group, over the standard deviation of the group: two prompts, four completions."""
    drawn, advantages = [], []

    def uneven(completions, **_):
        drawn.extend([0.0, 1.0, 3.5, 1.0, 2.0, 2.0, 2.0, 2.0])
        return drawn[-len(completions) :]

    compute_loss = LeanGRPOTrainer._compute_loss

    def noting(self, model, inputs):
        advantages.extend(inputs["advantages"].tolist())
        return compute_loss(self, model, inputs)

    monkeypatch.setitem(rewards.REWARDS, "answer", [uneven])
    monkeypatch.setattr(LeanGRPOTrainer, "_compute_loss", noting)
    train("grpo", grpo={"steps": 1})
    groups = torch.tensor(drawn).view(2, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    # TRL shuffles the rows of a step.
    assert sorted(advantages) == pytest.approx(sorted(expected.flatten().tolist()), abs=1e-5)
    assert max(advantages) > 1


def test_completions_written_in_parts_train_the_same(monkeypatch):
    whole, _, _ = train("grpo")
    together = []

    def complete(model, prompts, **options):
        together.append(len(prompts))
        return completions.complete(model, prompts, **options)

    monkeypatch.setattr(rollouts, "complete", complete)
    parts, _, _ = train("grpo", grpo={"rollout_batch": 4})
    # Two equal questions in a step are one prompt.
    assert set(together) == {1} and len(together) > STEPS["grpo"]
    for (name, expected), (_, found) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_rollouts_by_vllm_name_the_extra_or_reach_trl(monkeypatch):
    chosen = settings().changed(grpo={"rollouts": "vllm-colocate", "vllm_memory": 0.4}).grpo
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"vllm is not installed; pip install -e '.\[vllm\]'"):
        stages._rollouts(chosen)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    config = GRPOConfig(use_cpu=True, bf16=False, **stages._rollouts(chosen))
    assert (config.use_vllm, config.vllm_mode, config.vllm_gpu_memory_utilization) == (True, "colocate", 0.4)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_training_that_diverges_ends_with_its_step_and_its_last_good_checkpoint(stage, tmp_path):
    """The gradient becomes no number at step 4; checkpoints are written every second step."""
    model = make_tiny_policy()
    steps = []
    [parameter] = [p for name, p in model.named_parameters() if "layers.1.self_attn.q_proj.lora_A" in name]

    def watch():
        steps.append(1)
        if len(steps) == 3:
            parameter.register_hook(lambda gradient: gradient * float("nan"))
        return {}

    with pytest.raises(
        InputError, match=r"diverged at step 4 of \d+: grad_norm = nan; the last good checkpoint is .*-2"
    ):
        run = {"sft": training.run_sft, "grpo": training.run_grpo}[stage]
        run(model, make_tiny_tokenizer(), examples(), sparse_masks(model), settings(), tmp_path, watch)
    assert [path.name for path in checkpoints.finished_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_prompts_that_are_too_long_are_left_out_of_grpo_and_counted(capsys):
    rows = [row | {"prompt": "1 + 1 " * (1 + 9 * (i == 1))} for i, row in enumerate(examples()[:4])]
    short = settings().changed(grpo={"max_prompt_length": 20})
    kept = training.prompts_to_reinforce(rows, make_tiny_tokenizer(), short)
    assert len(kept) == 3 and "1 of 4 prompts are longer than grpo.max_prompt_length = 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reward", "change", "message"),
    [
        ("answer", {"answer": " "}, "example e0: it has no reference"),
        ("overlap", {"solution": ""}, "example e0: it has no reference"),
        ("answer", {"answer": "one\ntwo"}, "grpo.reward = 'answer': the reference of example e0 has several lines"),
    ],
)
def test_a_reference_that_no_completion_can_equal_is_named(reward, change, message):
    rows = [examples()[0] | change]
    with pytest.raises(InputError, match=message):
        training.prompts_to_reinforce(rows, make_tiny_tokenizer(), settings().changed(grpo={"reward": reward}))


def test_a_kl_term_restrains_stage_2_and_leaves_nothing_behind(tmp_path):
    kl = {"grpo": {"kl": 0.5}}
    start = make_tiny_policy()
    model, masks, history = train("grpo", **kl)
    assert all("kl" in entry for entry in history) and history[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    before = dict(start.named_parameters())
    for name, mask in masks.items():
        assert torch.equal(dict(model.named_parameters())[name][~mask], before[name][~mask])
    free, *_ = train("grpo")
    assert weights_hash(model) != weights_hash(free)


def test_a_stage_with_a_kl_term_goes_on_from_its_checkpoint_to_the_same_end(tmp_path):
    kl = {"grpo": {"kl": 0.5}}
    whole, *_ = train("grpo", tmp_path / "whole", **kl)
    train_interrupted("grpo", tmp_path / "parts", **kl)
    resumed, *_ = train("grpo", tmp_path / "parts", **kl)
    assert weights_hash(resumed) == weights_hash(whole)
