"""The quarter of an hour on a GPU, rehearsed on the CPU: each step's result is there, whatever becomes of the others."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress

import gpu_quarter_hour as quarter
import parcel
import pytest
from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_quarter_hour.sh"
ARMS = ("importance_0.9", "lora_sft")


def summary(out) -> dict[str, dict]:
    with (out / "summary.tsv").open() as stream:
        return {row["step"]: row for row in csv.DictReader(stream, delimiter="\t")}


def statuses(out) -> dict[str, str]:
    return {step: row["status"] for step, row in summary(out).items()}


def packed_records(archive) -> dict[str, dict]:
    with tarfile.open(archive) as opened:
        return {
            name.removeprefix("records/").removesuffix(".json"): json.load(opened.extractfile(name))
            for name in opened.getnames()
            if name.endswith(".json")
        }


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """What a rehearsal leaves in OUT, and the folder that it packed into."""
    out, folder = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("packed")
    command = [str(SCRIPT), "run", str(out), str(folder), "--rehearse", "--arms", ",".join(ARMS)]
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, folder


def test_every_step_ends_well_and_leaves_all_its_results(rehearsed):
    out, folder = rehearsed
    expected = {"unpack": "0", "tests": "skipped", "gpu": "0", "laptop": "0", "blocks": "0"}
    assert statuses(out) == expected, (out / "summary.tsv").read_text()
    assert len(list(out.iterdir())) <= 8
    figures = json.loads((out / "gpu.json").read_text())
    rows = {stage: [(row["rows"], row["checkpointing"]) for row in figures[stage]] for stage in ("sft", "grpo")}
    assert rows["sft"] == [(1, True), (1, False), (8, False)]
    assert rows["grpo"] == [(8, True), (8, False), (16, False)]
    assert all(row["seconds_a_step"] > 0 for stage in rows for row in figures[stage])
    assert figures["scoring"]["seconds"].keys() == {"batched", "one_by_one", "plain_pass"}
    assert figures["training"]["seconds"].keys() == {"lora_par", "lora"}
    assert figures["rollout"]["seconds"].keys() == {"complete", "generate"}
    laptop = {"voting", "importance", "base-seed0", "lorapar-seed0", "lora_stage1-seed0"}
    assert packed_records(out / "laptop.tar.gz").keys() == laptop
    cells = packed_records(out / "blocks.tar.gz")
    assert cells.keys() == {f"{arm}-seed0" for arm in ARMS}
    assert all("stage1/loss1" in record["result"]["metrics"] for record in cells.values())
    assert (folder / parcel.SITE / "six.py").is_file() and len(list((folder / "toy").glob("*.part*"))) > 1


def test_a_record_names_the_commit_where_there_is_no_history(rehearsed):
    out, folder = rehearsed
    if not (folder / parcel.TREE).is_file():
        pytest.skip("this tree has no history")
    commit = (folder / parcel.TREE).read_text().split("\n")[0]
    for record in packed_records(out / "blocks.tar.gz").values():
        assert record["run"]["commit"] == commit and record["run"]["dirty"] in (True, False)


def test_a_file_that_differs_from_the_commit_is_told(tmp_path):
    blob = parcel._blob(ROOT / "LICENSE")
    assert (
        blob
        == subprocess.run(["git", "hash-object", "LICENSE"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    )
    for told, digest in (("", blob), (" M LICENSE\n", "0" * 40)):
        (tmp_path / parcel.TREE).write_text(f"abc\n100644 blob {digest}\tLICENSE\n")
        git = parcel.stand_in_for_git(tmp_path) / "git"
        answers = [["rev-parse", "HEAD"], ["ls-files", "LICENSE", "other"], ["status", "--porcelain"]]
        found = [subprocess.run([git, *asked], capture_output=True, text=True).stdout for asked in answers]
        assert [found[0], found[1], found[2].removeprefix("\n")] == ["abc\n", "LICENSE\n", told]


# In the place of the interpreter that runs a step: quick, and hanging or failing where it is told to.
STUB = """
import json, os, sys, time
from pathlib import Path
words = sys.argv[1:]
names = {"pip": "unpack", "pytest": "tests", "profile": "laptop", "cells": "cells"}
name = next((names[word] for word in words if word in names), "gpu" if "gpu.py" in words[0] else words[-1])
if name in os.environ.get("HANGS", "").split():
    Path("hanging").write_text(str(os.getpid()))
    time.sleep(600)
if name in os.environ.get("FAILS", "").split():
    sys.exit(f"{name} broke")
if name in os.environ.get("FAILS_ONCE", "").split() and not Path("failed").is_file():
    Path("failed").write_text("")
    sys.exit(f"{name} found no memory")
def record(profile, name):
    folder = Path("runs", profile, "records")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text("{}")
if name == "tests":
    print("8 passed in 1.00s")
elif name == "gpu":
    Path(words[1]).write_text("{}")
elif name == "laptop":
    record("laptop", "voting")
elif name == "cells":
    print(json.dumps(["0 importance_0.9", "0 lora_sft"]))
elif name != "unpack":
    record("study", f"{name}-seed0")
"""
ALL_WELL = {"unpack": "0", "tests": "0", "gpu": "0", "laptop": "0", "blocks": "0"}
LEFT = {"gpu.json", "laptop.tar.gz", "blocks.tar.gz"}


@pytest.fixture
def start(rehearsed, tmp_path):
    """Starts a run over a copy of what was packed, with the stub in each step's place."""
    folder = tmp_path / "packed"
    shutil.copytree(rehearsed[1], folder, ignore=shutil.ignore_patterns("project", parcel.SITE))
    stub = tmp_path / "stub"
    stub.write_text(f"#!{sys.executable}\n{STUB}")
    stub.chmod(0o755)

    def started(seconds=60, **told):
        words = ["run", str(tmp_path / "out"), str(folder), "--rehearse", "--seconds", str(seconds)]
        code = f"import sys, gpu_quarter_hour; sys.executable = {str(stub)!r}; gpu_quarter_hour.main({words})"
        env = os.environ | told | {"PYTHONPATH": str(ROOT / "benchmarks")}
        return subprocess.Popen([sys.executable, "-c", code], env=env)

    return started


def test_a_cell_that_finds_no_memory_beside_the_others_is_tried_again_after_them(start, tmp_path):
    assert start(FAILS_ONCE="lora_sft").wait() == 0
    assert statuses(tmp_path / "out") == ALL_WELL
    assert "found no memory" in (tmp_path / "packed" / "logs" / "lora_sft-seed0.log").read_text()


def test_a_cell_that_fails_when_time_is_up_keeps_its_status(start, tmp_path):
    assert start(8, FAILS="lora_sft", HANGS="importance_0.9").wait() == 0
    note = "0 of 2 cells; whole blocks: none; importance_0.9-seed0: 124; lora_sft-seed0: 1"
    assert summary(tmp_path / "out")["blocks"]["note"] == note


def left(out) -> set[str]:
    return {path.name for path in out.iterdir()} & LEFT


def test_a_part_that_is_missing_is_named_and_costs_only_what_needs_it(start, tmp_path):
    weights, wheels = "toy/model.safetensors.part02", "wheels.tar.part01"
    (tmp_path / "packed" / weights).unlink()
    assert start().wait() == 0
    skipped = {"laptop": "skipped", "blocks": "skipped"}
    assert statuses(tmp_path / "out") == ALL_WELL | {"unpack": "1"} | skipped
    assert summary(tmp_path / "out")["unpack"]["note"] == f"missing or damaged: {weights}"
    with (tmp_path / "packed" / wheels).open("ab") as part:
        part.write(b"and more")
    assert start().wait() == 0
    assert f"{wheels}, {weights}" in summary(tmp_path / "out")["unpack"]["note"]
    assert left(tmp_path / "out") == {"gpu.json"}


@pytest.mark.parametrize(
    ("broken", "step", "note", "lost"),
    [
        ("unpack", "unpack", "unpack broke", set()),
        ("tests", "tests", "tests broke", set()),
        ("gpu", "gpu", "gpu broke", {"gpu.json"}),
        ("laptop", "laptop", "0 records; laptop broke", {"laptop.tar.gz"}),
        ("cells", "blocks", "cells broke", {"blocks.tar.gz"}),
        ("lora_sft", "blocks", "1 of 2 cells; whole blocks: none; lora_sft-seed0: 1", set()),
    ],
)
def test_a_step_that_fails_leaves_the_results_of_the_others(start, tmp_path, broken, step, note, lost):
    out = tmp_path / "out"
    assert start(FAILS=broken).wait() == 0
    assert statuses(out) == ALL_WELL | {step: "1"} and summary(out)[step]["note"] == note
    assert left(out) == LEFT - lost


def test_what_is_installed_is_not_installed_again(start, rehearsed, tmp_path):
    shutil.copytree(rehearsed[1] / parcel.SITE, tmp_path / "packed" / parcel.SITE)
    assert start(FAILS="unpack").wait() == 0 and statuses(tmp_path / "out") == ALL_WELL
    sums = tmp_path / "packed" / parcel.SUMS
    sums.write_text("".join(reversed(sums.read_text().splitlines(keepends=True))))  # as if packed anew
    assert start(FAILS="unpack").wait() == 0 and statuses(tmp_path / "out")["unpack"] == "1"


def test_the_time_that_is_up_ends_a_step_and_leaves_the_results_of_the_others(start, tmp_path):
    began = time.monotonic()
    assert start(seconds=5, HANGS="gpu importance_0.9").wait() == 0
    assert time.monotonic() - began < 12
    assert statuses(tmp_path / "out") == ALL_WELL | {"gpu": "124", "blocks": "124"}
    assert summary(tmp_path / "out")["blocks"]["note"] == "1 of 2 cells; whole blocks: none; importance_0.9-seed0: 124"
    assert packed_records(tmp_path / "out" / "blocks.tar.gz").keys() == {"lora_sft-seed0"}
    assert packed_records(tmp_path / "out" / "laptop.tar.gz").keys() == {"voting"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_what_is_finished(start, tmp_path, number):
    run, out, hanging = start(HANGS="lora_sft"), tmp_path / "out", tmp_path / "packed" / "project" / "hanging"
    until = time.monotonic() + 50
    while time.monotonic() < until and not (hanging.is_file() and (out / "blocks.tar.gz").is_file()):
        time.sleep(0.1)
    run.send_signal(number)
    told = number == signal.SIGTERM
    assert run.wait() == (128 + number if told else -number)
    assert packed_records(out / "blocks.tar.gz").keys() == {"importance_0.9-seed0"}
    assert left(out) == LEFT
    assert statuses(out) == {k: v for k, v in ALL_WELL.items() if k != "blocks"} | (
        {"blocks": "stopped"} if told else {}
    )
    if told:
        with pytest.raises(ProcessLookupError):
            os.kill(int(hanging.read_text()), 0)
    else:
        with suppress(ProcessLookupError):
            os.kill(int(hanging.read_text()), signal.SIGKILL)


def test_only_blocks_that_nobody_has_begun_are_missing_of_arms_with_frozen_rates(project):
    arm = {"sweep": "theta", "method": "lorapar", "stages": ["sft"], "learning_rate": 0.004, "title": "an arm"}
    both = arm | {"stages": ["sft", "grpo"]}
    arms = {"ours": arm, "other": arm, "both": both | {"grpo_learning_rate": 1e-4}, "half_tuned": both}
    arms |= {"base": arm | {"stages": []}, "untuned": arm | {"learning_rate": None}}
    arms |= {"tune": arm | {"sweep": "tuning", "measured_on": "validation_loss", "seeds": [100]}}
    content = {"extends": "smoke", "seeds": [0, 1, 2], "experiments": arms}
    (project / "profiles" / "mine.yaml").write_text(json.dumps(content))
    published = project / "results" / "mine"
    published.mkdir(parents=True)
    for name in ("ours-seed0", "base-seed1", "tune-seed100", "half_tuned-seed2"):
        (published / f"{name}.json").write_text("{}")
    expected = [f"{seed} {name}" for seed in (1, 2) for name in ("ours", "other", "both")]
    assert quarter.missing_cells("mine", set(), set()) == expected
    assert quarter.missing_cells("mine", {0, 2}, {"other"}) == ["0 other", "2 other"]
    with pytest.raises(SystemExit, match="mine has no experiment others"):
        quarter.missing_cells("mine", set(), {"others"})


def test_what_is_packed_is_pinned_and_nothing_that_is_there():
    pins = (ROOT / "requirements.lock").read_text().splitlines()
    wanted = parcel.needed("3.12", quarter.HAVE.split(","))
    names = {pin.split("==")[0].lower() for pin in wanted}
    assert set(wanted) <= set(pins)
    assert {"transformers", "trl", "peft", "datasets", "reasoning_gym", "pycosat", "gguf"} <= names
    assert not names & {"snakemake", "jupyter-book", *quarter.HAVE.split(",")}


def test_another_folder_is_never_emptied(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="holds files that were not packed by this script"):
        parcel.empty(tmp_path)
    assert (tmp_path / "thesis.tex").is_file()


def test_parts_fill_transfers_up_to_their_size(tmp_path):
    parts = []
    for number, size in enumerate((60, 60, 33, 12)):
        parts.append(tmp_path / f"{number}")
        parts[-1].write_bytes(bytes(size))
    assert [[path.stat().st_size for path in load] for load in quarter.loads(parts, 60)] == [[60], [60], [33, 12]]
