"""Both stages on the tiny model of `conftest`, in seconds."""

import hashlib

import pytest
import torch
from conftest import make_tiny_policy, make_tiny_tokenizer

from lorapar_utils import training
from lorapar_utils.settings import load_profile


def settings():
    return load_profile(
        "smoke",
        checkpoint_every=2,
        evaluation={"watch_every": 1},
        model={"dtype": "float32", "system_prompt": "system"},
        sft={"epochs": 3, "batch_size": 4, "accumulation": 2, "weight_decay": 0.1, "max_grad_norm": 0.5},
        grpo={
            "steps": 6,
            "prompts_per_step": 2,
            "completions": 4,
            "micro_batch": 4,
            "max_completion_length": 8,
            "learning_rate": 5e-3,
        },
    )


def examples():
    rows = []
    for i in range(24):
        a, b = 1 + i % 3, 1 + i // 3 % 3
        rows.append({"id": f"e{i}", "prompt": f"{a} + {b}", "answer": str(a), "solution": f"{a} + {b} \n #### {a}"})
    return rows


def sparse_masks(model):
    """Half of the elements, and one matrix of each kind with none at all."""
    generator = torch.Generator().manual_seed(5)
    masks = {
        name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in model.named_parameters() if "lora_" in name
    }
    for name in list(masks)[:2]:
        masks[name] = torch.zeros_like(masks[name])
    return masks


def train(stage, folder=None, watch=None, model=None, **changes):
    model = model or make_tiny_policy()
    masks = sparse_masks(model)
    run = {"sft": training.run_sft, "grpo": training.run_grpo}[stage]
    history = run(model, make_tiny_tokenizer(), examples(), masks, settings().changed(**changes), folder, watch)
    return model, masks, history


def weights_hash(model):
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def train_interrupted(stage, folder, model=None, **changes):
    """Train with checkpoints in `folder` until somebody presses stop, after the third step."""
    steps = iter(range(3))

    def stop_button():
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        train(stage, folder, stop_button, model, **changes)
