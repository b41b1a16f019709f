"""Folders that are made once: what makes them stale, what does not, and which damage is noticed."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from lorapar_utils import manifests, phases, splits
from lorapar_utils.settings import load_profile

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
    before = manifests.file_hash(first)
    stat = first.stat()
    os.utime(second, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second.replace(first)
    assert manifests.file_hash(first) != before


def test_a_file_overwritten_in_place_with_its_time_set_back_is_hashed_again(project, later):
    path = large(project, "a")
    before, stat = manifests.file_hash(path), path.stat()
    path.write_bytes(b"b" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert manifests.file_hash(path) != before


@pytest.mark.parametrize("garbled", [b"", b"0123", b"\xff\xfe", b"x" * 64])
def test_a_remembered_hash_that_is_none_is_computed_again(project, later, garbled):
    path = large(project, "a")
    expected = manifests.file_hash(path)
    [kept] = (project / "runs" / "file_hashes").iterdir()
    kept.write_bytes(garbled)
    assert manifests.file_hash(path) == expected == kept.read_text(encoding="utf-8")
    # It is remembered: what a file of this name says is believed.
    kept.write_text("0" * 64, encoding="utf-8")
    assert manifests.file_hash(path) == "0" * 64


def test_a_hash_that_cannot_be_remembered_is_computed_each_time(project, later):
    path = large(project, "a")
    (project / "runs").mkdir()
    (project / "runs" / "file_hashes").write_text("no folder can be here", encoding="utf-8")
    assert manifests.file_hash(path) == manifests.file_hash(path)


def test_the_code_is_hashed_alike_whatever_the_locale_says():
    script = "from lorapar_utils import manifests as m; print({x: m._code_hash(x) for x in sorted(m.with_imports('teachers'))})"
    modern = {"PYTHONUTF8": "1"}
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    said = [
        subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=os.environ | more, capture_output=True, text=True, check=True
        ).stdout
        for more in (modern, plain)
    ]
    assert said[0] == said[1] and "teachers" in said[0]


# --- damage ------------------------------------------------------------------------------------------------


def make(folder):
    with manifests.completed(folder, INPUTS) as scratch:
        (scratch / "inner").mkdir()
        (scratch / "inner" / "scores.bin").write_bytes(bytes(1000))
    return folder


def test_a_finished_folder_is_current_until_its_inputs_change(tmp_path, capsys):
    folder = make(tmp_path / "scores")
    assert manifests.made_from(folder) == INPUTS and manifests.is_current(folder, INPUTS)
    assert not manifests.is_current(folder, {"seed": 1}) and "because seed changed" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"\x01" * 1000, bytes(500), None], ids=["overwritten", "cut off", "taken away"])
def test_damage_to_a_finished_folder_is_noticed(tmp_path, capsys, content):
    folder = make(tmp_path / "scores")
    path = folder / "inner" / "scores.bin"
    path.unlink() if content is None else path.write_bytes(content)
    assert not manifests.is_current(folder, INPUTS) and "because it is damaged" in capsys.readouterr().out


def test_of_a_large_file_the_size_alone_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "HASHED_BYTES", 999)
    folder = make(tmp_path / "scores")
    assert json.loads((folder / "manifest.json").read_text(encoding="utf-8"))[manifests.HASHES] == {}
    (folder / "inner" / "scores.bin").write_bytes(b"\x01" * 1000)
    assert manifests.is_current(folder, INPUTS)
    (folder / "inner" / "scores.bin").write_bytes(bytes(999))
    assert not manifests.is_current(folder, INPUTS)


def test_an_older_manifest_with_sizes_alone_still_counts(tmp_path):
    folder = make(tmp_path / "scores")
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    del content[manifests.HASHES]
    manifest.write_text(json.dumps(content), encoding="utf-8")
    assert manifests.made_from(folder) == INPUTS
    (folder / "inner" / "scores.bin").write_bytes(bytes(999))
    assert manifests.made_from(folder) == {}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"sizes of files": 1}', "\x00"])
def test_a_damaged_manifest_is_no_traceback(tmp_path, content):
    folder = make(tmp_path / "scores")
    (folder / "manifest.json").write_text(content, encoding="utf-8")
    assert manifests.made_from(folder) == {}


def test_a_folder_that_was_copied_from_a_finished_one_is_whole(tmp_path):
    original, copy = make(tmp_path / "one"), tmp_path / "two"
    with manifests.completed(copy, INPUTS) as scratch:
        shutil.copytree(original, scratch, dirs_exist_ok=True)
    assert manifests.is_current(copy, INPUTS)


# --- what is and is not read ---------------------------------------------------------------------------------


def settings(folder, **changes):
    profile = load_profile("smoke", model={"source": str(folder), "dtype": "float32"})
    return profile.changed(voting={"split_by": "construction"}).changed(**changes)


def test_what_the_model_is_called_matters_to_voting_alone(project, saved_model):
    one, other = (settings(saved_model, model={"target_name": name}) for name in ("Llama", "Llama 2"))
    for inputs in (phases._scores_inputs, lambda s: phases._experiment_inputs(s, s.experiments["lorapar"])):
        assert inputs(one) == inputs(other)
    assert splits._voting_inputs(one) != splits._voting_inputs(other)
    assert phases._scores_inputs(one) != phases._scores_inputs(
        settings(saved_model, model={"plain_template": "{{ prompt }}"})
    )


@pytest.mark.parametrize(
    "name",
    [
        *("trainer_state.json", "training_args.bin", "optimizer.pt", "optimizer.bin", "eval_results.json", "README.md"),
        *("README.txt", "LICENSE.txt", "LICENSE-MODEL.txt", ".DS_Store", ".gitattributes"),
    ],
)
def test_what_trainers_and_people_leave_beside_a_model_is_not_of_it(project, saved_model, name):
    before = manifests.model_identity(settings(saved_model))
    (saved_model / name).write_bytes(b"{}")
    assert manifests.model_identity(settings(saved_model)) == before


@pytest.mark.parametrize("name", ["generation_config.json", "merges.txt", "chat_template.jinja", "tokenizer.model"])
def test_what_the_model_is_read_with_is_of_it(project, saved_model, name):
    before = manifests.model_identity(settings(saved_model))
    (saved_model / name).write_bytes(b"{ }")
    assert manifests.model_identity(settings(saved_model)) != before


def test_notes_beside_benchmark_data_are_not_of_it(tmp_path):
    rows, place = tmp_path / "elsewhere", tmp_path / "mmlu"
    rows.mkdir(), place.mkdir()
    (rows / "test.jsonl").write_text('{"answer": 0}', encoding="utf-8")
    (place / "all").symlink_to(rows)
    before = manifests.folder_hashes(str(place))
    assert list(before) == ["all/test.jsonl"]
    for name in ("README.md", ".DS_Store", "dataset_infos.json", "notes.txt", ".test.jsonl.swp"):
        (place / name).write_text("{}", encoding="utf-8")
    assert manifests.folder_hashes(str(place)) == before
    (rows / "test.jsonl").write_text('{"answer": 1}', encoding="utf-8")
    assert manifests.folder_hashes(str(place)) != before
    assert list(manifests.folder_hashes(str(place / "notes.txt"))) == ["notes.txt"]
    assert manifests.folder_hashes(str(tmp_path / "nowhere")) == {} and manifests.folder_hashes(None) is None


def test_validation_answers_that_are_watched_while_training_are_of_what_is_trained(project, saved_model):
    folder = project / "gsm8k"
    folder.mkdir()

    def stages(validation, watched):
        for split, answer in (("train", "1"), ("validation", validation), ("test", "1")):
            rows = [
                {"question": f"{split} t{i}?", "answer": "\n".join(["t1 t2"] * (1 + i % 4)) + f"\n#### {answer}"}
                for i in range(80)
            ]
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        own = settings(
            saved_model, pool={"source": "gsm8k", "path": str(folder)}, evaluation={"watch_prompts": watched}
        )
        inputs = phases._experiment_inputs(own, own.experiments["lorapar"])
        return [phases._stage_inputs(inputs, number) for number in (1, 2)]

    assert stages("1", 2) != stages("2", 2)
    assert stages("1", 0) == stages("2", 0)
