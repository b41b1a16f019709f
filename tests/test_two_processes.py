"""Training by two processes under `accelerate launch` is training by one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_policy
from safetensors.torch import load_file
from test_training import sparse_masks, train


def launch(stage: str, folder: Path) -> list[dict[str, torch.Tensor]]:
    """The weights that each of two processes ends with."""
    here = Path(__file__).parent
    # accelerate starts several processes on one machine by this flag alone; each then finds that it has no GPU.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, str(here / "two_processes.py"), stage, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [load_file(folder / f"{stage}-{rank}-of-2.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_two_processes_agree_and_leave_inactive_elements_alone(stage, tmp_path):
    before = dict(make_tiny_policy().named_parameters())
    masks = sparse_masks(make_tiny_policy())
    first, second = launch(stage, tmp_path)
    moved = 0
    for name, weights in first.items():
        assert torch.equal(weights, second[name])
        assert torch.equal(weights[~masks[name]], before[name].detach()[~masks[name]])
        moved += int((weights != before[name]).sum())
    assert moved > 100
    if stage == "sft":  # GRPO draws its own completions in each process
        model, _, _ = train("sft")
        for name, weights in model.named_parameters():
            if name in first:
                torch.testing.assert_close(first[name], weights.detach(), rtol=1e-4, atol=1e-5)
