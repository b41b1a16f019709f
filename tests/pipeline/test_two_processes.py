"""Two processes under `accelerate launch` do what one does: scores, both stages, completions; whole or shared-out base."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import two_processes
from conftest import make_tiny_policy
from safetensors.torch import load_file
from tiny_training import sparse_masks

from lorapar_utils.errors import InputError
from lorapar_utils.pipeline import launch
from lorapar_utils.pipeline.experiment import experiment
from lorapar_utils.settings import load_profile


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder in which two processes left what they ended with."""
    here, folder = Path(__file__).parent.parent, tmp_path_factory.mktemp("both")
    done = subprocess.run(
        [*launch.launcher(2), str(here / "two_processes.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(params=["whole", "sharded"])
def both(request, launched):
    return [launched / request.param / "0", launched / request.param / "1"]


def test_each_returns_the_scores_of_one(both):
    expected = two_processes.scores(False)
    for folder in both:
        found = load_file(folder / "scores")
        assert found.keys() == expected.keys()
        for name, values in found.items():
            torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_they_train_what_one_trains_and_leave_inactive_elements_alone(both, stage):
    before = dict(make_tiny_policy().named_parameters())
    masks = sparse_masks(make_tiny_policy())
    expected = two_processes.trained(stage, False)
    first, second = (load_file(folder / stage) for folder in both)
    moved = 0
    for name, weights in first.items():
        assert torch.equal(weights, second[name])
        assert torch.equal(weights[~masks[name]], before[name].detach()[~masks[name]])
        torch.testing.assert_close(weights, expected[name], rtol=1e-4, atol=1e-5)
        moved += int((weights != before[name]).sum())
    assert moved > 100


def test_each_returns_the_completions_of_one(both):
    expected = json.loads(json.dumps([two_processes.completions(samples) for samples in (0, 3)]))
    assert len(expected[1][0]) == 3
    for folder in both:
        assert json.loads((folder / "completions").read_text()) == expected


def test_a_process_ends_without_what_its_interpreter_does_last():
    script = (
        "import atexit, os; from lorapar_utils import distributed; "
        "atexit.register(os.abort); print(1); distributed.end(3)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "1\n")


def test_the_process_that_was_killed_is_named_also_if_another_ended_before_the_launcher_looked():
    said = """
E1126 02:31:13.100000 11925 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) local_rank: 0 (pid: 7)
Failures:
[1]:
  time      : 2026-11-26_02:31:13
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 8)
  error_file: <N/A>
Root Cause (first observed failure):
[0]:
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 7)
"""
    assert launch._why(said, 2).startswith("processes: process 1 of 2 was killed by SIGKILL")


def kill_the_second(folder: Path) -> None:
    """SIGKILL to the second of the processes that this one launched, once they have written a checkpoint."""
    while not list(folder.glob(".*-steps/checkpoint-*/finished")):
        time.sleep(0.05)
    children = psutil.Process().children(recursive=True)
    [second] = [child for child in children if child.environ().get("LOCAL_RANK") == "1"]
    second.kill()


def test_a_process_that_dies_stops_the_others_and_costs_no_checkpoint(project, saved_model):
    settings = load_profile(
        "smoke",
        processes=2,
        checkpoint_every=2,
        model={"source": str(saved_model), "dtype": "float32"},
        sft={"epochs": 2},
        adapter={"r": 8},
        voting={"split_by": "construction"},
    )
    folder = settings.runs / "experiments" / "lora_sft-seed0"
    threading.Thread(target=kill_the_second, args=(settings.runs / "stages",), daemon=True).start()
    with pytest.raises(InputError, match="process 1 of 2 was killed by SIGKILL, and the others were stopped"):
        experiment(settings, "lora_sft", 0)
    assert not (folder / "stage1").exists()
    alone = settings.changed(processes=1)
    with pytest.raises(InputError, match=r"processes = 1: .*checkpoint-\d+ was written by 2; set processes to 2"):
        experiment(alone, "lora_sft", 0)
    record = experiment(settings, "lora_sft", 0)
    steps = [entry["step"] for entry in record.result["tables"]["history_stage1"]]
    assert steps == list(range(1, 25))
    expected = experiment(alone.changed(profile="alone"), "lora_sft", 0)
    adapters = [
        load_file(place / "stage1" / "adapter" / "adapter_model.safetensors")
        for place in (folder, alone.changed(profile="alone").runs / "experiments" / "lora_sft-seed0")
    ]
    for name, weights in adapters[0].items():
        torch.testing.assert_close(weights, adapters[1][name], rtol=1e-3, atol=1e-5)
    assert [item["completion"] for item in record.items] == [item["completion"] for item in expected.items]
