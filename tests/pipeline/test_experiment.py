"""An experiment's stages: what another one has already trained is taken over, to the bit, and nothing else is."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import filelock
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorapar_utils import data, evaluation, training
from lorapar_utils.errors import InputError
from lorapar_utils.models.identity import model_identity
from lorapar_utils.partition import Partition
from lorapar_utils.pipeline import block, inputs, train
from lorapar_utils.pipeline.examples import Examples
from lorapar_utils.pipeline.experiment import experiment
from lorapar_utils.pipeline.measure import measure_inputs
from lorapar_utils.pipeline.train import stage_inputs
from lorapar_utils.records.intervals import Metric
from lorapar_utils.report import figures, tables
from lorapar_utils.settings import Selection, load_profile
from lorapar_utils.voting import split

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


@pytest.fixture
def scored(monkeypatch):
    """How often the test split was answered from here on."""
    times = []
    real = evaluation.score_pool
    monkeypatch.setattr(evaluation, "score_pool", lambda *a: times.append(1) or real(*a))
    return times


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
        experiment(chosen, name, 0)
        assert trained == expected
    alone = chosen.changed(profile="alone")
    expected = experiment(alone, "alpha1.0_beta1.0", 0)
    found = experiment(chosen, "alpha1.0_beta1.0", 0)
    assert [item["completion"] for item in found.items] == [item["completion"] for item in expected.items]
    for stage in ("stage1", "stage2"):
        ours, theirs = (adapter(place, "alpha1.0_beta1.0", stage) for place in (chosen, alone))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    first, second = (adapter(chosen, f"alpha1.0_beta{beta}", "stage2") for beta in (0.0, 1.0))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_setting_of_stage_2_trains_stage_2_alone_again(project, saved_model, trained):
    experiment(settings(saved_model), "alpha1.0_beta1.0", 0)
    trained.clear()
    experiment(settings(saved_model, grpo={"learning_rate": 1e-3}), "alpha1.0_beta1.0", 0)
    assert trained == ["run_grpo"]
    trained.clear()
    experiment(settings(saved_model, sft={"learning_rate": 1e-4}), "alpha1.0_beta1.0", 0)
    assert trained == ["run_sft", "run_grpo"]


@pytest.mark.parametrize(
    ("phase", "again"),
    [("scores", ["run_sft", "run_grpo"]), ("train", ["run_sft", "run_grpo"]), ("measure", [])],
)
def test_code_of_a_phase_that_changed_makes_it_anew_and_what_rests_on_it(
    project, saved_model, trained, scored, monkeypatch, phase, again
):
    """Which files are the code of a phase: see `test_cache`."""
    before = experiment(settings(saved_model), "alpha1.0_beta1.0", 0)
    trained.clear(), scored.clear()
    real = inputs.code_of
    monkeypatch.setattr(inputs, "code_of", lambda file: "other" if Path(file).stem == phase else real(file))
    after = experiment(settings(saved_model), "alpha1.0_beta1.0", 0)
    assert trained == again and len(scored) == 2
    assert after.result["tables"].keys() == before.result["tables"].keys()
    assert [item["completion"] for item in after.items] == [item["completion"] for item in before.items]


@pytest.mark.parametrize(
    ("changed", "from_stage"),
    [
        ({"alpha": 0.0}, 1),
        ({"beta": 0.0}, 2),
        ({"theta": 0.5}, 1),
        ({"sft": {"learning_rate": 9e-4}}, 1),
        ({"grpo": {"learning_rate": 9e-4}}, 2),
        ({"seed": 1}, 1),
        ({"speed": "plain"}, 1),
        ({"evaluation": {"max_new_tokens": 1}}, 3),
    ],
)
def test_what_a_stage_rests_on(project, saved_model, changed, from_stage):
    def both_stages(own):
        spec = own.experiments["alpha1.0_beta1.0"]
        systems = Examples(own).systems
        return [stage_inputs(own, spec, number, systems, "scores", []) for number in (1, 2)]

    pairs = zip(both_stages(settings(saved_model)), both_stages(settings(saved_model, **changed)), strict=True)
    assert [one == other for one, other in pairs] == [number < from_stage for number in (1, 2)]


def test_stages_in_the_other_order_rest_on_the_other_settings(project, saved_model):
    own = settings(saved_model)
    spec = own.experiments["alpha1.0_beta1.0"].model_copy(update={"stages": ("grpo", "sft")})
    first, second = (stage_inputs(own, spec, number, Examples(own).systems, "scores", []) for number in (1, 2))
    assert {"beta", "grpo"} <= set(first) and not {"alpha", "sft"} & set(first)
    assert {"alpha", "beta", "sft", "grpo"} <= set(second)


def test_the_pool_is_made_and_the_votes_are_read_once_for_an_experiment(project, saved_model, monkeypatch):
    times = {"pool": 0, "systems": 0}
    for module, name, key in ((data, "load_pool", "pool"), (split, "systems", "systems")):
        real = getattr(module, name)

        def counted(*arguments, real=real, key=key):
            times[key] += 1
            return real(*arguments)

        monkeypatch.setattr(module, name, counted)
    experiment(settings(saved_model), "alpha1.0_beta1.0", 0)
    assert times == {"pool": 1, "systems": 1}


def test_what_is_measured_anew_is_not_trained_anew(project, saved_model, trained, scored):
    chosen = settings(saved_model)
    before = experiment(chosen, "alpha1.0_beta1.0", 0)
    trained.clear(), scored.clear()
    experiment(chosen, "alpha1.0_beta1.0", 0)
    assert (trained, scored) == ([], [])
    longer = experiment(chosen.changed(evaluation={"max_new_tokens": 3}), "alpha1.0_beta1.0", 0)
    assert trained == [] and len(scored) == 2
    # The adapters of both stages, each put back and scored.
    back = experiment(chosen, "alpha1.0_beta1.0", 0)
    assert trained == [] and longer.items != before.items and back.result == before.result


def test_a_metric_that_was_added_later_reaches_old_runs(project, saved_model, trained, scored, monkeypatch):
    chosen = settings(saved_model)
    before = experiment(chosen, "alpha1.0_beta1.0", 0)
    trained.clear(), scored.clear()
    real = evaluation.accuracy_metrics
    later = {"words": Metric(1.0, 1)}
    monkeypatch.setattr(evaluation, "accuracy_metrics", lambda items: real(items) | later)
    after = experiment(chosen, "alpha1.0_beta1.0", 0)
    assert (trained, scored) == ([], [])
    assert after.metric("stage2/words").value == 1.0 and "stage2/words" not in before.result["metrics"]
    assert (after.run, after.environment) == (before.run, before.environment)


def write_pool(folder, answer):
    for name, count in (("train", 80), ("test", 20)):
        rows = [
            {"question": f"{name} t{i}?", "answer": "\n".join(["t1 t2"] * (1 + i % 4)) + f"\n#### {answer}"}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_data_weights_and_votes_edited_in_place_are_noticed_by_content(project, saved_model):
    data_folder = project / "gsm8k"
    data_folder.mkdir()
    write_pool(data_folder, "1")
    votes = project / "votes.csv"
    teacher = {"name": "colleague", "kind": "recorded", "path": str(votes)}
    own = settings(saved_model, pool={"source": "gsm8k", "path": str(data_folder)}).changed(
        voting={"split_by": "votes", "teachers": [teacher], "panels": {}, "panel": None}
    )
    ids = [row["id"] for row in data.load_pool(own) if row["split"] == "train"]
    votes.write_text("id,system\n" + "".join(f"{name},{1 + i % 2}\n" for i, name in enumerate(ids)))

    def state():
        return {
            "answers": {row["answer"] for row in split.votes(own)},
            "systems": [row["system"] for row in split.votes(own)],
            "model": model_identity(own),
            "scoring": measure_inputs(own, "stage", Examples(own).test, [], "test"),
        }

    before = state()
    write_pool(data_folder, "2")
    mended = state()
    assert mended["answers"] == {"2"} and mended["scoring"] != before["scoring"]
    votes.write_text("id,system\n" + "".join(f"{name},{2 - i % 2}\n" for i, name in enumerate(ids)))
    assert state()["systems"] == [3 - system for system in mended["systems"]]
    weights = saved_model / "model.safetensors"
    save_file({name: 2 * values for name, values in load_file(weights).items()}, weights, {"format": "pt"})
    assert state()["model"] != before["model"]
    # The same content elsewhere is the same model.
    moved = shutil.copytree(saved_model, project / "elsewhere")
    assert model_identity(own.changed(model={"source": str(moved)})) == state()["model"]


def test_examples_that_a_later_stage_cannot_read_are_named_before_the_first_is_trained(project, saved_model, trained):
    chosen = settings(saved_model, grpo={"max_prompt_length": 1})
    with pytest.raises(InputError, match="grpo.max_prompt_length = 1: every prompt of System 2 is longer; raise it"):
        experiment(chosen, "alpha1.0_beta1.0", 0)
    with pytest.raises(InputError, match="evaluation.mmlu.path: .* holds no"):
        (project / "empty").mkdir()
        asked = {"benchmarks": ["mmlu"], "mmlu": {"path": str(project / "empty")}}
        experiment(settings(saved_model, evaluation=asked), "alpha1.0_beta1.0", 0)
    assert trained == []


def test_free_text_is_scored_by_overlap_and_loss(project, saved_model):
    rows = [{"instruction": f"t{i} and t{i % 7}?", "response": f"t{i % 5} t{i % 3}", "context": ""} for i in range(120)]
    (project / "dolly.jsonl").write_text("\n".join(map(json.dumps, rows)))
    free = settings(saved_model, pool={"source": "dolly-15k", "path": str(project / "dolly.jsonl")})
    teacher = {"name": "colleague", "kind": "recorded", "path": str(project / "votes.csv")}
    free = free.changed(
        voting={"split_by": "votes", "teachers": [teacher], "panels": {}, "panel": None},
        evaluation={"watch_prompts": 2, "watch_every": 1},
    )
    ids = [row["id"] for row in data.load_pool(free) if row["split"] == "train"]
    (project / "votes.csv").write_text("id,system\n" + "".join(f"{name},{1 + i % 2}\n" for i, name in enumerate(ids)))
    record = experiment(free, "alpha1.0_beta1.0", 0)
    for stage in ("stage1", "stage2"):
        assert 0 <= record.metric(f"{stage}/overlap").value <= 1 and record.metric(f"{stage}/loss").value > 0
        assert f"{stage}/accuracy" not in record.result["metrics"]
    assert "gain/overlap" in record.result["metrics"]
    history = record.result["tables"]["history_stage2"]
    assert all("rewards/overlap/mean" in entry for entry in history if "reward" in entry)
    assert any("validation/overlap" in entry for entry in history)
    assert set(tables.stage_table([record])) >= {"overlap", "loss"}
    figures.stage_accuracy([record])


DAMAGED = (
    "scores/*/system1.safetensors",
    "experiments/*/stage1/outcome.json",
    "experiments/*/stage1/adapter/adapter_model.safetensors",
    "experiments/*/stage1/partition/masks.safetensors",
    "experiments/*/stage1/manifest.json",
    "records/*.json",
    "records/*.items.jsonl",
)


@pytest.mark.parametrize("how", ["cut off", "taken away"])
@pytest.mark.parametrize("pattern", DAMAGED)
def test_what_was_damaged_is_made_again_and_comes_out_the_same(project, saved_model, pattern, how):
    chosen = settings(saved_model)
    before = experiment(chosen, "alpha1.0_beta1.0", 0)
    [path, *_] = sorted(chosen.runs.glob(pattern), key=lambda p: ".items." in p.name and "items" not in pattern)
    if how == "cut off":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    after = experiment(chosen, "alpha1.0_beta1.0", 0)
    assert [item["completion"] for item in after.items] == [item["completion"] for item in before.items]
    assert after.metric("stage2/accuracy") == before.metric("stage2/accuracy")


def test_two_runs_give_equal_records(project, saved_model):
    runs = [experiment(settings(saved_model, profile=name), "alpha1.0_beta1.0", 0) for name in ("one", "other")]
    metrics, tables = (
        [
            {key: value for key, value in run.result[block].items() if not key.endswith(("seconds", "bytes"))}
            for run in runs
        ]
        for block in ("metrics", "tables")
    )
    assert metrics[0] == metrics[1] and runs[0].items == runs[1].items
    assert [without_times(table) for table in tables[0].values()] == [without_times(t) for t in tables[1].values()]


def without_times(history):
    return [{key: value for key, value in entry.items() if "time" not in key} for entry in history]


CELL = {"sweep": "regions", "method": "lorapar", "stages": ["sft"], "title": "a cell"}


@pytest.mark.parametrize("selection", sorted({*get_args(Selection)} - {"importance", "random_stage2"}))
def test_a_control_trains_other_elements_in_equal_number(project, saved_model, selection):
    cells = {"importance": CELL, "control": CELL | {"selection": selection}}
    chosen = settings(saved_model).changed(experiments=cells)
    both = [experiment(chosen, name, 0) for name in cells]
    masks = [Partition.load(chosen.runs / "experiments" / f"{name}-seed0" / "stage1" / "partition") for name in cells]
    assert not torch.equal(masks[0].active[0], masks[1].active[0])
    # Swapped, stage 1 has the number of stage 2.
    wanted = masks[0].active[1 if selection == "swapped" else 0].sum()
    assert masks[1].active[0].sum() == wanted
    assert both[1].metric("active/stage1").value == pytest.approx(int(wanted) / masks[0].active[0].numel())
    weights = adapter(chosen, "control", "stage1")
    assert any(
        not torch.equal(weights[name], values) for name, values in adapter(chosen, "importance", "stage1").items()
    )


def test_the_control_of_stage_2_alone_trains_stage_1_once(project, saved_model, trained):
    cells = {"importance": CELL | {"stages": ["sft", "grpo"]}}
    cells["control"] = cells["importance"] | {"selection": "random_stage2"}
    chosen = settings(saved_model).changed(experiments=cells)
    for name in cells:
        experiment(chosen, name, 0)
    assert trained == ["run_sft", "run_grpo", "run_grpo"]


def test_masks_by_magnitude_are_those_of_the_initial_values_also_in_the_second_stage(project, saved_model):
    cells = {"cell": CELL | {"selection": "magnitude", "stages": ["sft", "grpo"]}}
    chosen = settings(saved_model).changed(experiments=cells)
    experiment(chosen, "cell", 0)
    home = chosen.runs / "experiments" / "cell-seed0"
    masks = Partition.load(home / "stage1" / "partition")
    # Stage 1 is kept, but has to be measured again before stage 2 is trained.
    for folder in (chosen.runs / "stages").glob("[!.]*"):
        if folder != (home / "stage1").resolve():
            shutil.rmtree(folder)
    experiment(chosen, "cell", 0)
    again = Partition.load(home / "stage2" / "partition")
    assert all(torch.equal(a, b) for a, b in zip(masks.active, again.active, strict=True))


def test_a_run_that_chooses_settings_reads_no_test_row(project, saved_model, monkeypatch):
    tuning = {"sweep": "tuning", "method": "lora", "stages": ["sft"], "title": "a rate", "learning_rate": 0.002}
    cells = {"loss": tuning | {"measured_on": "validation_loss"}, "answers": tuning | {"measured_on": "validation"}}
    chosen = settings(saved_model).changed(experiments=cells, evaluation={"benchmarks": ["gsm_symbolic"]})
    monkeypatch.setattr(evaluation, "benchmark_items", lambda *_: pytest.fail("a benchmark was read"))
    monkeypatch.setattr(Examples, "test", property(lambda self: pytest.fail("the test split was read")))
    validation = {row["id"] for row in data.load_pool(chosen) if row["split"] == "validation"}
    loss, answers = (experiment(chosen, name, 0) for name in cells)
    assert {item["id"] for item in loss.items} == {item["id"] for item in answers.items} == validation
    assert not any("completion" in item for item in loss.items)
    assert {
        "stage1/loss",
        "stage1/loss1",
        "stage1/loss2",
    } <= loss.metrics.keys() and "stage1/accuracy" not in loss.metrics
    assert loss.metric("stage1/loss1").value == pytest.approx(answers.metric("stage1/loss1").value)
    assert "stage1/pass@2" in answers.metrics
    assert loss.run["parameters"]["measured_on"] == "validation_loss"
    assert loss.run["parameters"]["learning_rate"] == 0.002


def test_flipped_labels_move_examples_to_the_other_system(project, saved_model):
    chosen = settings(saved_model)
    right, wrong = (Examples(chosen.changed(voting={"flipped": share})).systems for share in (0.0, 0.25))
    total = sum(map(len, right.values()))
    moved = {row["id"] for row in wrong[1]} ^ {row["id"] for row in right[1]}
    assert len(moved) == round(0.25 * total) and sum(map(len, wrong.values())) == total
    other = Examples(chosen.changed(seed=1, voting={"flipped": 0.25})).systems
    assert {row["id"] for row in other[1]} != {row["id"] for row in wrong[1]}


def test_a_record_names_what_it_was_trained_on(project, saved_model):
    cells = {"cell": CELL, "flipped": CELL | {"flipped": 0.25}}
    chosen = settings(saved_model).changed(experiments=cells)
    plain, flipped = (experiment(chosen, name, 0).environment["hashes"] for name in cells)
    assert plain["weights"] == flipped["weights"] and plain["data"] == flipped["data"]
    assert plain["D1"] != flipped["D1"] and plain["D2"] != flipped["D2"]


def test_a_stage_is_locked_while_it_is_trained(project, saved_model, monkeypatch):
    chosen, real, held = settings(saved_model).changed(experiments={"a": CELL}), training.run_sft, []

    def trained(*arguments):
        (path,) = (chosen.runs / "stages").glob(".*.lock")
        with pytest.raises(filelock.Timeout):
            block.lock(path, timeout=0)
        held.append(path)
        return real(*arguments)

    monkeypatch.setattr(training, "run_sft", trained)
    experiment(chosen, "a", 0)
    with block.lock(*held, timeout=0):
        pass


def test_a_stage_whose_lock_cannot_be_written_is_an_error_that_names_the_folder(tmp_path):
    (tmp_path / "stages").write_text("a file in the folder's place")
    with pytest.raises(InputError, match="runs: .*stages cannot be written"), train.alone_at(tmp_path / "stages" / "a"):
        pass


def test_a_stage_that_another_run_is_training_is_waited_for_and_read_back(project, saved_model, trained, monkeypatch):
    chosen, real, others = settings(saved_model).changed(experiments={"a": CELL}), train.alone_at, []

    @contextmanager
    def waited(folder):
        if not others:
            others.append(folder)
            experiment(chosen, "a", 0)
        with real(folder):
            yield

    monkeypatch.setattr("lorapar_utils.pipeline.experiment.alone_at", waited)
    experiment(chosen, "a", 0)
    assert others and trained == ["run_sft"]


def test_a_block_takes_what_no_other_process_has_and_goes_on_where_it_was(project, saved_model, trained, capsys):
    chosen = settings(saved_model).changed(
        experiments={name: CELL | {"theta": t} for name, t in (("a", 0.5), ("b", 0.6))}
    )
    marks = chosen.runs / "blocks"
    marks.mkdir(parents=True)
    with block.lock(marks / "a-seed0.lock"):
        block.run_block(chosen, 0, [])
    assert trained == ["run_sft"] and [p.stem for p in (chosen.runs / "records").glob("*.json")] == ["b-seed0"]
    block.run_block(chosen, 0, [])
    assert trained == ["run_sft"] * 2
    block.run_block(chosen, 0, ["b"])
    assert trained == ["run_sft"] * 2 and "b-seed0" in capsys.readouterr().out
    with pytest.raises(InputError, match="block: smoke has no 'c' at seed 0; it has a, b"):
        block.run_block(chosen, 0, ["c"])
