"""Folders that are made once: what makes them stale, what does not, and which damage is noticed."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from lorapar_utils import cache
from lorapar_utils.data.files import folder_hashes
from lorapar_utils.models.identity import model_identity
from lorapar_utils.pipeline.examples import Examples
from lorapar_utils.pipeline.measure import measure_inputs
from lorapar_utils.pipeline.scores import scores_folder
from lorapar_utils.pipeline.train import stage_inputs
from lorapar_utils.settings import load_profile
from lorapar_utils.voting import split

INPUTS = {"seed": 0}


@pytest.fixture
def later(monkeypatch):
    """A minute from now: what has just been written was not written a moment ago."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 60 * 10**9)


def large(folder, letter):
    path = folder / f"{letter}.bin"
    path.write_bytes(letter.encode() * (2 << 20))
    return path


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_hashed_again(project, later):
    first, second = large(project, "a"), large(project, "b")
    before = cache.file_hash(first)
    stat = first.stat()
    os.utime(second, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second.replace(first)
    assert cache.file_hash(first) != before


def test_a_file_overwritten_in_place_with_its_time_set_back_is_hashed_again(project, later):
    path = large(project, "a")
    before, stat = cache.file_hash(path), path.stat()
    path.write_bytes(b"b" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.file_hash(path) != before


@pytest.mark.parametrize("garbled", [b"", b"0123", b"\xff\xfe", b"x" * 64])
def test_a_remembered_hash_that_is_none_is_computed_again(project, later, garbled):
    path = large(project, "a")
    expected = cache.file_hash(path)
    [kept] = (project / "runs" / "file_hashes").iterdir()
    kept.write_bytes(garbled)
    assert cache.file_hash(path) == expected == kept.read_text(encoding="utf-8")
    # It is remembered: what a file of this name says is believed.
    kept.write_text("0" * 64, encoding="utf-8")
    assert cache.file_hash(path) == "0" * 64


def test_a_hash_that_cannot_be_remembered_is_computed_each_time(project, later):
    path = large(project, "a")
    (project / "runs").mkdir()
    (project / "runs" / "file_hashes").write_text("no folder can be here", encoding="utf-8")
    assert cache.file_hash(path) == cache.file_hash(path)


def test_the_code_is_hashed_alike_whatever_the_locale_says():
    script = "from lorapar_utils import cache; print(cache.code_of(cache.PACKAGE / 'voting' / 'split.py'))"
    modern = {"PYTHONUTF8": "1"}
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    hashes = [
        subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=os.environ | more, capture_output=True, text=True, check=True
        ).stdout.strip()
        for more in (modern, plain)
    ]
    assert hashes[0] == hashes[1] and re.fullmatch(r"[0-9a-f]{16}", hashes[0])


def test_the_code_is_hashed_alike_by_each_version_of_python(tmp_path, monkeypatch):
    """From 3.12 on a function's syntax tree has one more field, which is empty."""
    path = tmp_path / "code.py"
    path.write_text("def f():\n    return []\n", encoding="utf-8")
    expected = cache._code_hash.__wrapped__(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body[0]._fields, tree.body[0].type_params = (*tree.body[0]._fields, "type_params"), []
    monkeypatch.setattr(ast, "parse", lambda _: tree)
    assert cache._code_hash.__wrapped__(path) == expected


# --- code --------------------------------------------------------------------------------------------------

PHASES = {"votes": "voting/split.py", "scores": "pipeline/scores.py", "training": "pipeline/train.py"}
PHASES |= {"measuring": "pipeline/measure.py"}
# What rests on a file: its phases, and no other.
RESTS_ON = {
    "voting/teachers.py": {"votes"},
    "voting/ballots.py": {"votes"},
    "importance.py": {"scores"},
    "optim.py": {"training"},
    "training/rewards.py": {"training"},
    "evaluation/humaneval.py": {"measuring"},
    "evaluation/sandbox/checker.py": {"measuring"},
    "records/intervals.py": {"measuring"},
    "records/from_votes.py": set(),
    "pipeline/record.py": set(),
    "report/figures.py": set(),
    "data/pool.py": set(PHASES),
    "fast/decoding.py": set(PHASES),
    "models/base.py": set(PHASES),
    "settings.py": set(PHASES),
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package's files to edit, with the hashes of each phase's code."""
    copy = tmp_path / "lorapar_utils"
    shutil.copytree(cache.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "PACKAGE", copy)

    def hashes():
        cache._syntax_tree.cache_clear(), cache._code_hash.cache_clear()
        return {phase: cache.code_of(copy / file) for phase, file in PHASES.items()}

    yield copy, hashes
    cache._syntax_tree.cache_clear(), cache._code_hash.cache_clear()


@pytest.mark.parametrize(("file", "phases"), RESTS_ON.items(), ids=RESTS_ON)
def test_an_edited_file_makes_stale_what_rests_on_it_and_nothing_else(package, file, phases):
    copy, hashes = package
    before = hashes()
    (copy / file).write_text((copy / file).read_text(encoding="utf-8") + "\nLATER = 1\n", encoding="utf-8")
    after = hashes()
    assert {phase for phase in PHASES if after[phase] != before[phase]} == phases


@pytest.mark.parametrize("file", ["voting/teachers.py", "training/rewards.py", "fast/shared_prefix.py"])
def test_a_deleted_file_changes_the_code_of_what_imports_it(package, file):
    copy, hashes = package
    before = hashes()
    (copy / file).unlink()
    assert hashes() != before


def test_comments_layout_and_docstrings_are_no_code(package):
    copy, hashes = package
    before, path = hashes(), copy / "optim.py"
    text = path.read_text(encoding="utf-8").replace('"""AdamW', '"""The AdamW', 1)
    path.write_text(f"{text}\n\n# A remark.\n", encoding="utf-8")
    assert hashes() == before


def test_a_page_rests_on_what_its_notebook_imports():
    files = {str(path.relative_to(cache.PACKAGE)) for path in cache.code_files(ROOT / "notebooks" / "06_claims.py")}
    assert {"report/claims.py", "records/record.py", "settings.py"} <= files
    assert not any(file.startswith(("training/", "models/", "pipeline/")) for file in files)


# --- damage ------------------------------------------------------------------------------------------------


def make(folder):
    with cache.completed(folder, INPUTS) as scratch:
        (scratch / "inner").mkdir()
        (scratch / "inner" / "scores.bin").write_bytes(bytes(1000))
    return folder


def test_a_completed_folder_is_whole_and_knows_what_it_was_made_from_and_when(tmp_path):
    folder = tmp_path / "scores"
    assert not cache.is_whole(folder)
    make(folder)
    assert cache.is_whole(folder) and {"created", "commit", "packages", "hardware"} <= set(cache.origin_of(folder))
    assert json.loads((folder / cache.MANIFEST).read_text(encoding="utf-8"))["inputs"] == INPUTS


def test_a_block_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), cache.completed(tmp_path / "scores", INPUTS) as scratch:
        (scratch / "half").write_text("")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"\x01" * 1000, bytes(500), None], ids=["overwritten", "cut off", "taken away"])
def test_damage_to_a_completed_folder_is_noticed_and_mended(tmp_path, capsys, content):
    folder = make(tmp_path / "scores")
    path = folder / "inner" / "scores.bin"
    path.unlink() if content is None else path.write_bytes(content)
    assert not cache.is_whole(folder)
    make(folder)
    assert cache.is_whole(folder) and "made again, because it is damaged" in capsys.readouterr().out


def test_of_a_large_file_the_size_alone_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "HASHED_BYTES", 999)
    folder = make(tmp_path / "scores")
    (folder / "inner" / "scores.bin").write_bytes(b"\x01" * 1000)
    assert cache.is_whole(folder)
    (folder / "inner" / "scores.bin").write_bytes(bytes(999))
    assert not cache.is_whole(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '{"files": 1}', '{"files": {"a": 1}}', "\x00"])
def test_a_damaged_manifest_is_no_traceback(tmp_path, content):
    folder = make(tmp_path / "scores")
    (folder / cache.MANIFEST).write_text(content, encoding="utf-8")
    assert not cache.is_whole(folder)


def test_a_folder_that_another_process_has_completed_in_the_meantime_stays(tmp_path):
    folder = tmp_path / "scores"
    with cache.completed(folder, INPUTS) as scratch:
        (scratch / "a").write_text("second")
        with cache.completed(folder, INPUTS) as other:
            (other / "a").write_text("first")
    assert (folder / "a").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["scores"]


# --- what is and is not read ---------------------------------------------------------------------------------


def settings(folder, **changes):
    profile = load_profile("smoke", model={"source": str(folder), "dtype": "float32"})
    return profile.changed(voting={"split_by": "construction"}).changed(**changes)


def inputs_of_stages(own, name="lorapar"):
    """What both stages of an experiment, and the measurements after the first, are made from."""
    spec, examples = own.experiments[name], Examples(own)
    systems, watched = examples.systems, examples.watched
    stages = [stage_inputs(own, spec, number, systems, "scores", watched) for number in (1, 2)]
    return [*stages, measure_inputs(own, "stage", examples.measured(spec), examples.chains(spec), "test")]


def test_what_the_model_is_called_matters_to_voting_alone(project, saved_model):
    one, other = (settings(saved_model, model={"target_name": name}) for name in ("Llama", "Llama 2"))
    systems = Examples(one).systems
    assert inputs_of_stages(one) == inputs_of_stages(other)
    assert scores_folder(one, systems) == scores_folder(other, systems)
    assert split.votes_folder(one) != split.votes_folder(other)
    plain = settings(saved_model, model={"plain_template": "{{ prompt }}"})
    assert scores_folder(one, systems) != scores_folder(plain, systems)


def test_another_version_of_what_scores_is_measured_again_and_trains_nothing_again(project, saved_model, monkeypatch):
    before = inputs_of_stages(settings(saved_model))
    monkeypatch.setattr("lorapar_utils.pipeline.measure.libraries", lambda *names: dict.fromkeys(names, "another"))
    after = inputs_of_stages(settings(saved_model))
    assert before[:2] == after[:2] and before[2] != after[2]


@pytest.mark.parametrize(
    "name",
    [
        *("trainer_state.json", "training_args.bin", "optimizer.pt", "optimizer.bin", "eval_results.json", "README.md"),
        *("README.txt", "LICENSE.txt", "LICENSE-MODEL.txt", ".DS_Store", ".gitattributes"),
    ],
)
def test_what_trainers_and_people_leave_beside_a_model_is_not_of_it(project, saved_model, name):
    before = model_identity(settings(saved_model))
    (saved_model / name).write_bytes(b"{}")
    assert model_identity(settings(saved_model)) == before


@pytest.mark.parametrize("name", ["generation_config.json", "merges.txt", "chat_template.jinja", "tokenizer.model"])
def test_what_the_model_is_read_with_is_of_it(project, saved_model, name):
    before = model_identity(settings(saved_model))
    (saved_model / name).write_bytes(b"{ }")
    assert model_identity(settings(saved_model)) != before


def test_notes_beside_benchmark_data_are_not_of_it(tmp_path):
    rows, place = tmp_path / "elsewhere", tmp_path / "mmlu"
    rows.mkdir(), place.mkdir()
    (rows / "test.jsonl").write_text('{"answer": 0}', encoding="utf-8")
    (place / "all").symlink_to(rows)
    before = folder_hashes(str(place))
    assert list(before) == ["all/test.jsonl"]
    for name in ("README.md", ".DS_Store", "dataset_infos.json", "notes.txt", ".test.jsonl.swp"):
        (place / name).write_text("{}", encoding="utf-8")
    assert folder_hashes(str(place)) == before
    (rows / "test.jsonl").write_text('{"answer": 1}', encoding="utf-8")
    assert folder_hashes(str(place)) != before
    assert list(folder_hashes(str(place / "notes.txt"))) == ["notes.txt"]
    assert folder_hashes(str(tmp_path / "nowhere")) == {} and folder_hashes(None) is None


def test_validation_answers_that_are_watched_while_training_are_of_what_is_trained(project, saved_model):
    folder = project / "gsm8k"
    folder.mkdir()

    def stages(validation, watched):
        for name, answer in (("train", "1"), ("validation", validation), ("test", "1")):
            rows = [
                {"question": f"{name} t{i}?", "answer": "\n".join(["t1 t2"] * (1 + i % 4)) + f"\n#### {answer}"}
                for i in range(80)
            ]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        own = settings(
            saved_model, pool={"source": "gsm8k", "path": str(folder)}, evaluation={"watch_prompts": watched}
        )
        return inputs_of_stages(own)[:2]

    assert stages("1", 2) != stages("2", 2)
    assert stages("1", 0) == stages("2", 0)
