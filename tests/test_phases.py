"""An experiment's stages: what another one has already trained is taken over, to the bit, and nothing else is."""

import pytest
import torch
from safetensors.torch import load_file

from lorapar_utils import phases, training
from lorapar_utils.phases import _stage_inputs
from lorapar_utils.settings import load_profile

STAGES = {"sweep": "alpha_beta", "method": "lorapar", "stages": ["sft", "grpo"], "title": "a cell"}


def settings(model, **changes):
    cells = {f"alpha{a}_beta{b}": {**STAGES, "alpha": a, "beta": b} for a, b in ((1.0, 0.0), (1.0, 1.0), (0.5, 1.0))}
    chosen = load_profile(
        "smoke",
        model={"source": str(model), "dtype": "float32"},
        voting={"split_by": "construction"},
        experiments=cells,
    )
    return chosen.changed(**changes)


@pytest.fixture
def trained(monkeypatch):
    """The names of the stages that are really trained from here on."""
    names = []
    for name in ("run_sft", "run_grpo"):
        real = getattr(training, name)
        monkeypatch.setattr(training, name, lambda *a, name=name, real=real: names.append(name) or real(*a))
    return names


def adapter(chosen, name, stage):
    return load_file(chosen.runs / "experiments" / f"{name}-seed0" / stage / "adapter" / "adapter_model.safetensors")


def test_a_stage_that_another_experiment_has_trained_is_taken_over(project, saved_model, trained):
    chosen = settings(saved_model)
    for name, expected in (
        ("alpha1.0_beta0.0", ["run_sft", "run_grpo"]),
        ("alpha1.0_beta1.0", ["run_grpo"]),
        ("alpha0.5_beta1.0", ["run_sft", "run_grpo"]),
    ):
        trained.clear()
        phases.experiment(chosen, name, 0)
        assert trained == expected
    alone = chosen.changed(profile="alone")
    expected = phases.experiment(alone, "alpha1.0_beta1.0", 0)
    found = phases.experiment(chosen, "alpha1.0_beta1.0", 0)
    assert [item["completion"] for item in found.items] == [item["completion"] for item in expected.items]
    for stage in ("stage1", "stage2"):
        ours, theirs = (adapter(place, "alpha1.0_beta1.0", stage) for place in (chosen, alone))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    first, second = (adapter(chosen, f"alpha1.0_beta{beta}", "stage2") for beta in (0.0, 1.0))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_setting_of_stage_2_trains_stage_2_alone_again(project, saved_model, trained):
    phases.experiment(settings(saved_model), "alpha1.0_beta1.0", 0)
    trained.clear()
    phases.experiment(settings(saved_model, grpo={"learning_rate": 1e-3}), "alpha1.0_beta1.0", 0)
    assert trained == ["run_grpo"]
    trained.clear()
    phases.experiment(settings(saved_model, sft={"learning_rate": 1e-4}), "alpha1.0_beta1.0", 0)
    assert trained == ["run_sft", "run_grpo"]


@pytest.mark.parametrize(
    ("changed", "from_stage"),
    [
        ({"partition": {"theta": 0.9, "alpha": 0.0, "beta": 1.0}}, 1),
        ({"partition": {"theta": 0.9, "alpha": 1.0, "beta": 0.0}}, 2),
        ({"partition": {"theta": 0.5, "alpha": 1.0, "beta": 1.0}}, 1),
        ({"sft": {"epochs": 1}}, 1),
        ({"grpo": {"steps": 1}}, 2),
        ({"scores": "others"}, 1),
        ({"evaluation": {"max_new_tokens": 1}}, 1),
        ({"experiment": {"method": "lorapar", "selection": "random", "stages": ["sft", "grpo"]}}, 1),
    ],
)
def test_what_a_stage_rests_on(changed, from_stage):
    inputs = {
        "experiment": {"method": "lorapar", "selection": "importance", "stages": ["sft", "grpo"], "beta": 1.0},
        "scores": "these",
        "partition": {"theta": 0.9, "alpha": 1.0, "beta": 1.0},
        "evaluation": {"max_new_tokens": 48},
        "sft": {"epochs": 2},
        "grpo": {"steps": 20},
    }
    for number in (1, 2):
        same = _stage_inputs(inputs, number) == _stage_inputs(inputs | changed, number)
        assert same == (number < from_stage)


def test_stages_in_the_other_order_rest_on_the_other_settings():
    inputs = {
        "experiment": {"method": "lorapar", "selection": "importance", "stages": ["grpo", "sft"]},
        "partition": {"theta": 0.9, "alpha": 1.0, "beta": 1.0},
        "sft": {"epochs": 2},
        "grpo": {"steps": 20},
    }
    first = _stage_inputs(inputs, 1)
    assert "sft" not in first and first["grpo"] == {"steps": 20} and first["partition"] == {"theta": 0.9, "beta": 1.0}
    assert _stage_inputs(inputs, 2)["sft"] == {"epochs": 2}
