import csv
import gzip
import io
import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path

import datasets
import pytest
import sympy
from conftest import ROOT

from lorapar_utils import data
from lorapar_utils.data import ladder, splits
from lorapar_utils.errors import InputError
from lorapar_utils.settings import load_profile

SUMS = load_profile("laptop", pool={f"system{k}": {"train": 256, "validation": 80, "test": 150} for k in (1, 2)})
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"


@pytest.fixture(scope="module")
def pool():
    return list(data.load_pool(SUMS))


def test_splits_have_their_sizes_and_share_no_prompt(pool):
    sizes = SUMS.pool
    for split in splits.SPLITS:
        rows = [row for row in pool if row["split"] == split]
        for system in (1, 2):
            count = sum(row["construction"] == system for row in rows)
            assert count == getattr(getattr(sizes, f"system{system}"), split)
    assert len({row["prompt"] for row in pool}) == len({row["id"] for row in pool}) == len(pool)


def test_solutions_are_true_and_have_the_steps_they_claim(pool):
    for row in pool:
        *steps, last = row["solution"].splitlines()
        assert last == f"#### {row['answer']}" and len(steps) == row["steps"]
        for step in steps:
            left, right = step.split(" = ")
            first, sign, second = re.fullmatch(r"(-?\d+) ([+-]) (\d+)", left).groups()
            assert int(right) == (int(first) + int(second) if sign == "+" else int(first) - int(second))
        if steps:
            assert steps[-1].split(" = ")[1] == row["answer"]


@pytest.fixture(scope="module")
def rungs():
    return list(data.load_pool(load_profile("study")))


def test_every_family_has_as_many_questions_on_both_rungs_of_every_split(rungs):
    counts = Counter((row["split"], row["construction"], row["task"]) for row in rungs)
    sizes = load_profile("study").pool
    for (split, system, _), count in counts.items():
        assert count == getattr(getattr(sizes, f"system{system}"), split) // 4
    assert len(counts) == 3 * 2 * 4
    assert len({row["prompt"] for row in rungs}) == len({row["id"] for row in rungs}) == len(rungs)


def test_neither_family_nor_number_of_lines_tells_the_systems_apart(rungs):
    lines = {system: {row["steps"] for row in rungs if row["construction"] == system} for system in (1, 2)}
    assert lines == {1: {1, 2, 3}, 2: {3, 4}}
    assert {row["task"] for row in rungs if row["construction"] == 1} == {"sums", "legs", "places", "people"}


def test_sums_and_people_of_the_ladder_follow_from_their_prompts(rungs):
    for row in rungs:
        *lines, last = row["solution"].splitlines()
        assert last == f"#### {row['answer']}" and len(lines) == row["steps"]
        for line in lines:
            if row["task"] == "sums":
                left, right = line.split(" = ")
                assert sympy.sympify(left) == int(right)
            if row["task"] == "people":
                assert line.replace(": ", " is ") + "." in row["prompt"]
        results = [line.split(": ")[-1].split(" = ")[-1] for line in lines]
        if row["task"] == "sums":
            asked = row["prompt"].removeprefix("Work out ").removeprefix("Compute ").rstrip(".")
            totals = [str(sympy.sympify(one)) for one in re.split(", | and ", asked)]
            assert re.split(", | and ", row["answer"]) == totals
        if row["task"] == "legs":
            for line in lines:
                left, right = line.split(": ")[1].split(" = ")
                assert sympy.sympify(left.replace("x", "*")) == int(right)
            together = results[-1:] if "together" in row["prompt"] else results
            assert re.split(", | and ", row["answer"]) == together
        if row["task"] == "places" and "same continent" in row["prompt"]:
            continents = [line for line in results if line in ladder.CONTINENTS.values()]
            assert row["answer"] == ("yes" if len(set(continents)) == 1 else "no") and len(continents) == 2
        if row["task"] == "people":
            assert row["answer"] == results[-1] or re.split(", | and ", row["answer"]) == results


def test_another_pool_seed_makes_another_ladder(rungs):
    other = data.load_pool(load_profile("study", pool={"seed": 2}))
    tested = [{row["prompt"] for row in rows if row["split"] == "test"} for rows in (rungs, other)]
    assert len(tested[0] & tested[1]) < 0.25 * len(tested[0])


def test_a_ladder_that_asks_for_more_than_there_is_is_refused(monkeypatch):
    same = itertools.repeat(("Compute 1 + 1.", "2", ["1 + 1 = 2"]))
    monkeypatch.setattr(ladder, "families", lambda seed, system: {"sums": same})
    with pytest.raises(InputError, match=r"pool.system1: 1112 examples of sums asked for, .* made 1;"):
        data.load_pool(load_profile("study", pool={"seed": 7}))


def test_links_are_the_steps_of_longer_sums_and_share_no_prompt():
    plain = load_profile("smoke", pool={"system1": {"train": 60, "validation": 10, "test": 10}})
    rows = list(data.load_pool(plain.changed(pool={"running_totals": True})))
    links = [row for row in rows if row["task"] == "link"]
    assert len(links) >= 10 and {row["steps"] for row in links} == {1}
    # Totals that no sum of two one-digit terms asks for.
    assert any(not 0 <= int(row["prompt"].split()[2]) <= 9 for row in links)
    assert all(row["solution"].startswith(row["prompt"][len("What is ") : -1] + " = ") for row in links)
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert not any(row["task"] == "link" for row in data.load_pool(plain))


def test_same_seed_same_pool_other_seed_another():
    first, again = (list(data.load_pool(load_profile("smoke"))) for _ in range(2))
    other = list(data.load_pool(load_profile("smoke", pool={"seed": 1})))
    assert first == again and first != other


def test_asking_for_more_than_there_is_names_the_remedy():
    with pytest.raises(InputError, match=r"pool.system1: .* ask for fewer"):
        data.load_pool(load_profile("smoke", pool={"system1": {"train": 100_000, "validation": 1, "test": 1}}))


def external(source, path, train=4, validation=1, test=1, **more):
    one = {"train": train, "validation": validation, "test": test}
    path = path if path is None else str(path)
    return load_profile("smoke", pool={"source": source, "path": path, "system1": one, "system2": one} | more)


def questions(tag, count=60):
    """GSM8K's form, of one and of three steps in turn."""
    steps = ["1 + 1 = 2", "2 + 1 = 3", "3 + 1 = 4"]
    return [
        {"question": f"{tag} {i}?", "answer": "\n".join([*steps[: 1 + i % 2 * 2], f"#### {i}"])} for i in range(count)
    ]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(folder, files):
    """Files by name: rows as JSON lines or Parquet, bytes as they are."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet") and isinstance(content, list):
            datasets.Dataset.from_list(content).to_parquet(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else lines(content))
    return folder


def tags(pool):
    """The first word of the prompts of each split."""
    return {split: {row["prompt"].split()[0] for row in pool if row["split"] == split} for split in splits.SPLITS}


def counts(pool):
    """Rows of each split: of System 1, of System 2."""
    systems = [(row["split"], row["construction"]) for row in pool]
    return {split: tuple(systems.count((split, system)) for system in (1, 2)) for split in splits.SPLITS}


# --- which files are read ----------------------------------------------------------------------------------

A, B, HELD, TEST = (questions(tag) for tag in ("a", "b", "held", "test"))
LAYOUTS = {
    "shards in the hub's folders": {
        "main/train-00000-of-00002.parquet": A,
        "main/train-00001-of-00002.parquet": B,
        "main/test-00000-of-00001.parquet": TEST,
        "socratic/train-00000-of-00001.parquet": questions("socratic"),
    },
    "shards with a hash": {
        "data/train-00000-of-00002-0a1b2c3d4e5f6789.parquet": A,
        "data/train-00001-of-00002-9876f5e4d3c2b1a0.parquet": B,
        "data/test-00000-of-00001-1234567890abcdef.parquet": TEST,
    },
    "numbered parts": {"train_1.jsonl": A, "train_2.jsonl": B, "test.jsonl": TEST},
    "a folder a split": {
        "train/part-00000.jsonl": A,
        "train/part-00001.jsonl": B,
        "Test/rows.jsonl": TEST,
        "dev/rows.jsonl": HELD,
    },
    "the set's name in front": {"gsm8k_train.jsonl": A + B, "gsm8k_test.jsonl": TEST, "gsm8k_val.jsonl": HELD},
    "a version behind": {"train-v1.1.json": A + B, "test-v1.1.jsonl": TEST, "dev-v1.1.json": HELD},
    "other words": {"training.jsonl": A + B, "testing.jsonl": TEST, "eval.jsonl": HELD},
    "a training file without the word": {"gsm8k.jsonl": A + B, "validation.jsonl": HELD, "test.jsonl": TEST},
    "what editors and tools leave": {
        "train.jsonl": A + B,
        "test.jsonl": TEST,
        ".ipynb_checkpoints/train-checkpoint.jsonl": HELD,
        "__MACOSX/train.jsonl": b"\0\5\x16\7",
        "._train.jsonl": b"\0\5\x16\7",
        ".train.jsonl.swp": b"b0VIM",
        "train.jsonl~": HELD,
        "#train.jsonl#": HELD,
        "train.jsonl.bak": HELD,
        "train (copy).jsonl": HELD,
        "train - Copy.jsonl": HELD,
        "train 2.jsonl": HELD,
        "dataset_infos.json": b"{}",
        "dataset_info.json": b"{}",
        "state.json": b"{}",
        "metadata.jsonl": b"{}",
        "README.md": b"# Data",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_told_by_the_names_of_their_files(layout, tmp_path):
    pool = data.load_pool(external("gsm8k", write(tmp_path, LAYOUTS[layout]), train=50))
    held_out = {"held"} if any(rows is HELD and "train" not in name for name, rows in LAYOUTS[layout].items()) else None
    assert tags(pool) == {"train": {"a", "b"}, "validation": held_out or tags(pool)["validation"], "test": {"test"}}
    assert tags(pool)["validation"] <= {"a", "b", "held"}


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    parts = {split: datasets.Dataset.from_list(rows) for split, rows in {"train": A, "test": TEST}.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    parts["train"].save_to_disk(tmp_path / "one")
    assert tags(data.load_pool(external("gsm8k", tmp_path / "both"))) == {
        "train": {"a"},
        "validation": {"a"},
        "test": {"test"},
    }
    assert tags(data.load_pool(external("gsm8k", tmp_path / "one")))["test"] == {"a"}


def test_a_number_alone_is_no_sign_of_other_parts(tmp_path, capsys):
    write(tmp_path, {"train_7473.jsonl": A, "test_1319.jsonl": TEST})
    assert tags(data.load_pool(external("gsm8k", tmp_path)))["test"] == {"test"}
    assert "left out" not in capsys.readouterr().out


def test_the_plain_name_is_read_and_the_other_is_named(tmp_path, capsys):
    """As in the repository openai/grade-school-math."""
    names = ["train", "test", "train_socratic", "test_socratic", "example_model_solutions"]
    write(tmp_path, {f"{name}.jsonl": questions(name) for name in names})
    assert tags(data.load_pool(external("gsm8k", tmp_path)))["train"] == {"train"}
    assert (
        "test.jsonl, train.jsonl read, example_model_solutions.jsonl, test_socratic.jsonl, train_socratic.jsonl left out"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "names, message",
    [
        (["code_alpaca_20k.json", "code_alpaca_2k.json"], "code_alpaca_20k.json, code_alpaca_2k.json: any of them"),
        (["train-v1.0.jsonl", "train-v1.1.jsonl"], "train-v1.0.jsonl, train-v1.1.jsonl: any of them can be the train"),
        (["train_2019.jsonl", "train_2020.jsonl"], "train_2019.jsonl, train_2020.jsonl: any of them"),
        (["train.jsonl", "train.json"], "train.json, train.jsonl: any of them"),
        (["plain/train.jsonl", "socratic/train.jsonl"], "plain/train.jsonl, socratic/train.jsonl: any of them"),
        (["train.jsonl", "test_a.jsonl", "test_b.jsonl"], "test_a.jsonl, test_b.jsonl: any of them can be the test"),
        (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"], "in 3 shards, .* numbers 0, 2 .*fetch"),
        (["train-00000-of-00001-aaaa.jsonl", "train-00000-of-00001-bbbb.jsonl"], "numbers 0, 0 .* there twice"),
        (["test.jsonl"], "has no row to train on .*test 60.* add a file train.jsonl"),
        (["train.txt"], "holds no .json, .jsonl"),
    ],
)
def test_files_of_which_one_must_be_meant_are_named(names, message, tmp_path):
    write(tmp_path, {name: questions("a") for name in names})
    with pytest.raises(InputError, match=f"pool.path: .*{message}"):
        data.load_pool(external("gsm8k", tmp_path))


def test_a_file_named_directly_is_read_without_its_siblings(tmp_path):
    write(tmp_path, {"test.jsonl": A, "train.jsonl": B, "notes.txt": b"x"})
    assert set().union(*tags(data.load_pool(external("gsm8k", tmp_path / "test.jsonl"))).values()) == {"a"}
    for name, message in (("notes.txt", "is no .json, .jsonl"), ("nowhere", "there is no .*; name the folder")):
        with pytest.raises(InputError, match=f"pool.path: .*{message}"):
            data.load_pool(external("gsm8k", tmp_path / name))


def test_a_link_that_leads_nowhere_is_named_and_no_test_split_drawn_in_its_place(tmp_path):
    write(tmp_path, {"train.jsonl": A})
    for name in ("test.jsonl", "test", "other"):
        link = tmp_path / name
        link.symlink_to(tmp_path / "moved" / "rows.jsonl")
        with pytest.raises(
            InputError, match=rf"pool.path: .*{name}, a link to .*rows.jsonl, cannot be read .* mend it"
        ):
            data.load_pool(external("gsm8k", tmp_path))
        link.unlink()
    # What is not read anyway may be anything.
    (tmp_path / ".#train.jsonl").symlink_to("somebody@host.4711")
    (tmp_path / "README.md").symlink_to(tmp_path / "moved" / "README.md")
    assert tags(data.load_pool(external("gsm8k", tmp_path)))["test"] == {"a"}


def test_a_linked_folder_is_looked_into_and_read_once(tmp_path, capsys):
    write(tmp_path, {"elsewhere/rows.jsonl": TEST, "set/main/train.jsonl": A})
    (tmp_path / "set" / "test").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "default").symlink_to("main")
    (tmp_path / "set" / "main" / "around").symlink_to(tmp_path / "set")
    # Below no configuration of its own, so that all of them are seen.
    tables = data.read_tables("evaluation.mmlu.path", str(tmp_path / "set"), "cais/mmlu", "all")
    assert {split: table["question"][0] for split, table in tables.items()} == {"train": "a 0?", "test": "test 0?"}
    # A file that is written behind the link is read anew.
    write(tmp_path, {"elsewhere/rows.jsonl": HELD})
    assert data.read_tables("x", str(tmp_path / "set"), "cais/mmlu", "all")["test"]["question"][0] == "held 0?"


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write(tmp_path, {"train.jsonl": A, "test/rows.jsonl": TEST})
    listed = Path.iterdir

    def iterdir(folder):
        if folder.name == "test":
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(
        InputError, match=r"pool.path: .*/test cannot be read \(Permission denied\); mend it or its rights"
    ):
        data.load_pool(external("gsm8k", tmp_path))


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(write(tmp_path, {"gsm8k/train.jsonl": A})))
    assert tags(data.load_pool(external("gsm8k", "~/gsm8k")))["train"] == {"a"}


def test_a_benchmark_reads_the_splits_it_asks_for_by_their_own_names(tmp_path):
    """MMLU's `dev` is no validation, and its training rows are many."""
    names = {"all/dev.jsonl": A, "all/validation.jsonl": HELD, "all/test.jsonl": TEST, "anatomy/test.jsonl": B}
    write(tmp_path, names | {"all/auxiliary_train.jsonl": b"not read"})
    asked = ("evaluation.mmlu.path", str(tmp_path), "cais/mmlu", "all")
    tables = data.read_tables(*asked, splits=("dev", "test"))
    assert {split: table["question"][0] for split, table in tables.items()} == {"dev": "a 0?", "test": "test 0?"}
    write(tmp_path, {"all/auxiliary_train.jsonl": B})
    assert set(data.read_tables(*asked)) == {"train", "dev", "validation", "test"}
    with pytest.raises(InputError, match=r"evaluation.mmlu.path: .* is one file; name the folder that holds dev and"):
        data.read_tables("evaluation.mmlu.path", str(tmp_path / "all/dev.jsonl"), "cais/mmlu", "all", ("dev", "test"))


def test_a_table_with_values_of_several_types_is_named(tmp_path):
    write(tmp_path, {"dev.jsonl": [{"answer": 1}, {"answer": "B"}]})
    with pytest.raises(InputError, match=r"evaluation.mmlu.path: a column of dev holds values of several types"):
        data.read_tables("evaluation.mmlu.path", str(tmp_path), "cais/mmlu", "all")


def failing(error):
    def load_dataset(*_):
        raise error

    return load_dataset


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach it on the Hub (OfflineModeIsEnabled)"),
        datasets.exceptions.DatasetNotFoundError("It is a gated dataset on the Hub"),
        ValueError("BuilderConfig 'main' not found"),
    ],
)
def test_a_hub_that_does_not_answer_is_an_input_error(error, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", failing(error))
    with pytest.raises(InputError, match=r"pool.source = dolly-15k: databricks/.*hf auth login.*or put its files into"):
        data.load_pool(external("dolly-15k", None))


def test_rows_of_the_hub_are_read_split_by_split(monkeypatch):
    tables = {"train": datasets.Dataset.from_list(A), "test": datasets.Dataset.from_list([TEST[0], {"question": "x"}])}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: tables)
    with pytest.raises(InputError, match=r"pool.source = gsm8k: openai/gsm8k, test, row 2 is malformed: answer = None"):
        data.load_pool(external("gsm8k", None, seed=1))
    pool = data.load_pool(external("gsm8k", None, seed=1, bad_rows="drop"))
    assert tags(pool) == {"train": {"a"}, "validation": {"a"}, "test": {"test"}}


# --- what is in them ---------------------------------------------------------------------------------------


def table(rows, separator):
    """As a spreadsheet writes it: with line ends inside quotation marks, and Windows line ends outside."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


@pytest.mark.parametrize(
    "name, content",
    [
        ("train.json", json.dumps(A, indent=1).encode()),
        ("train.json", json.dumps({"version": "1.1", "data": A}).encode()),
        ("train.json", lines(A)),
        ("train.jsonl", b"\n".join(json.dumps(row, indent=1).encode() for row in A)),
        ("train.jsonl", b"\xef\xbb\xbf" + lines(A).replace(b"\n", b"\r\n") + b"\r\n"),
        ("train.jsonl.gz", gzip.compress(lines(A), mtime=0)),
        ("TRAIN.JSONL", lines(A)),
        ("anything.csv", b"\xef\xbb\xbf" + table(A, ",")),
        ("train.tsv", table(A, "\t")),
        ("train.parquet", A),
    ],
)
def test_the_same_rows_in_every_form(name, content, tmp_path):
    write(tmp_path, {"plain/train.jsonl": A, f"other/{name}": content})
    plain, other = (list(data.load_pool(external("gsm8k", tmp_path / folder))) for folder in ("plain", "other"))
    assert plain == other


def test_a_csv_answer_is_a_text_whatever_it_looks_like(tmp_path):
    rows = [{"instruction": f"Print {i}.", "input": "", "output": text} for i, text in enumerate(["None", "007"] * 6)]
    write(tmp_path, {"train.csv": table(rows, ",")})
    assert {row["answer"] for row in data.load_pool(external("codealpaca-20k", tmp_path))} == {"None", "007"}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("train.jsonl", b"", "train.jsonl is empty"),
        ("train.jsonl", b"\n \n", "train.jsonl is empty"),
        ("train.json", b"[]", "train.json is empty"),
        ("train.csv", b"question,answer\n", "train.csv is empty"),
        ("train.jsonl", lines(A)[:-9], "train.jsonl .* line 60 is broken JSON"),
        ("train.json", json.dumps(A)[:-9].encode(), "train.json .* broken JSON"),
        ("train.jsonl", b"<!DOCTYPE html>", "train.jsonl .* line 1 is broken JSON"),
        ("train.csv", b'question,answer\na,"b', "train.csv cannot be read: unexpected end of data"),
        ("train.csv", b"question,answer\na,b\nWell, who?,#### 1\n", "train.csv, line 3 has more values"),
        ("train.jsonl", "é".encode("latin-1"), "train.jsonl is not in UTF-8"),
        ("train.parquet", b"PAR1", "train.parquet cannot be read"),
        ("data-00000-of-00001.arrow", b"no table", "arrow cannot be read"),
        ("train.jsonl.gz", gzip.compress(lines(A), mtime=0)[:99], "train.jsonl.gz cannot be read"),
        ("train.jsonl.gz", lines(A), "train.jsonl.gz cannot be read"),
        ("train.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "git lfs pull"),
        ("train-00000-of-00001.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, content, message, tmp_path):
    write(tmp_path, {name: content})
    with pytest.raises(InputError, match=f"pool.path: .*{message}"):
        data.load_pool(external("gsm8k", tmp_path))


BAD_ROWS = {
    "a missing key": ({"question": "2 + 2?"}, "it has no 'answer', only 'question'"),
    "a null": ({"question": None, "answer": "#### 4"}, "question = None is not a text"),
    "a number": ({"question": "2 + 2?", "answer": 4}, "answer = 4 is not a text"),
    "a list": (["2 + 2?", "4"], "is no object with keys"),
    "a blank question": ({"question": " \n", "answer": "#### 4"}, "is not a text"),
    "an invisible question": ({"question": "\u200b\ufeff", "answer": "#### 4"}, "is not a text"),
    "half a character": ({"question": "2 + 2 \ud83d?", "answer": "#### 4"}, "half a character"),
    "a blank answer": ({"question": "2 + 2?", "answer": ""}, "answer = '' is not a text"),
    "no mark": ({"question": "2 + 2?", "answer": "four"}, "no `#### number`: 'four'"),
    "nothing after the mark": ({"question": "2 + 2?", "answer": "2 + 2 = 4\n#### "}, "nothing after `####`"),
    "punctuation after the mark": ({"question": "2 + 2?", "answer": "2 + 2 = 4\n#### — ?"}, "nothing after `####`"),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_malformed_row_is_named_with_its_line_or_dropped(bad, tmp_path, capsys):
    row, message = BAD_ROWS[bad]
    write(tmp_path, {"train.jsonl": [*A[:6], row, *A[6:], row]})
    with pytest.raises(
        InputError, match=f"pool.path: train.jsonl, line 7 is malformed: .*{message}.*so are 1 other .*bad_rows"
    ):
        data.load_pool(external("gsm8k", tmp_path))
    assert tags(data.load_pool(external("gsm8k", tmp_path, bad_rows="drop")))["train"] == {"a"}
    assert "2 rows of gsm8k dropped: train.jsonl, line 7" in capsys.readouterr().out


def test_a_malformed_row_of_a_table_or_list_is_named_with_its_number(tmp_path):
    rows = [*A, {"question": "2 + 2?", "answer": "four"}]
    write(tmp_path, {"a/train-00000-of-00001.parquet": rows, "b/rows.json": json.dumps(rows).encode()})
    for folder, place in (("a", "train-00000-of-00001.parquet, row 61"), ("b", "rows.json, row 61")):
        with pytest.raises(InputError, match=f"pool.path: {place} is malformed"):
            data.load_pool(external("gsm8k", tmp_path / folder))


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not beside the project")
def test_gsm8k_from_a_local_folder():
    rows = list(data.load_pool(external("gsm8k", GSM8K, 50, 10, 20)))
    assert counts(rows) == {"train": (50, 50), "validation": (10, 10), "test": (20, 20)}
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all(row["solution"].endswith(f"#### {row['answer']}") and row["steps"] > 0 for row in rows)
    test = {json.loads(line)["question"] for line in (GSM8K / "test.jsonl").read_text().splitlines()}
    assert all((row["prompt"] in test) == (row["split"] == "test") for row in rows)


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not beside the project")
def test_gsm8k_whole(capsys):
    """One question in four has two steps: System 2 fills the splits up. No question is in the set twice."""
    pool = data.load_pool(external("gsm8k", GSM8K, 3737, 200, 660))
    assert counts(pool) == {"train": (1861, 5232), "validation": (100, 280), "test": (183, 477)}
    said = capsys.readouterr().out
    assert "train 7093 of 7474 asked for (System 1: 1861, System 2: 5232)" in said
    assert "too few rows of System 1 for train, validation: System 2 fills up" in said
    assert "left out" not in said


# Rows as in the sets themselves.
ROWS = {
    "dolly-15k": {
        "instruction": "When did flight {} start?",
        "context": "It started on 31 August 2000.[3][4]",
        "response": "On 31 August 2000.",
        "category": "closed_qa",
    },
    "open-platypus": {
        "input": "",
        "output": "To find out, I add.\n\n#### Sum\nIt is $\\boxed{2}$.",
        "instruction": "Add 1 to {}.",
        "data_source": "MATH/PRM-800K",
    },
    "codealpaca-20k": {"instruction": "Print {}.", "input": "in Python", "output": "print()"},
}


@pytest.mark.parametrize("source", ROWS)
def test_other_sources_load_from_a_folder_in_the_hub_layout(source, tmp_path, capsys):
    rows = [{k: v.format(i) if k == "instruction" else v for k, v in ROWS[source].items()} for i in range(12)]
    extra = "context" if source == "dolly-15k" else "input"
    response = "response" if source == "dolly-15k" else "output"
    rows[1][extra], rows[2][extra] = None, " "
    del rows[3][extra]
    write(tmp_path, {"data/rows-15k.jsonl": rows})
    pool = list(data.load_pool(external(source, tmp_path)))
    assert [sum(row["split"] == split for row in pool) for split in splits.SPLITS] == [8, 2, 2]
    assert set(pool[0]) == set(data.COLUMNS) and {row["steps"] for row in pool} == {-1}
    assert all(row["answer"] == row["solution"] == rows[0][response] for row in pool)
    kept = [row["instruction"] + (f"\n\n{rows[0][extra]}" if rows[0][extra] else "") for row in rows]
    assert {row["prompt"] for row in pool} == {*kept[:1], *(row["instruction"] for row in rows[1:4]), *kept[4:]}
    assert f"pool: {source}: train 8; validation 2; test 2" in capsys.readouterr().out
    write(tmp_path, {"data/rows-15k.jsonl": [*rows, rows[0] | {response: " "}, rows[0] | {extra: 5}]})
    with pytest.raises(InputError, match=rf"rows-15k.jsonl, line 13 is malformed: {response} = ' '.*; so are 1 other"):
        data.load_pool(external(source, tmp_path))


# --- which rows do what ------------------------------------------------------------------------------------


def test_no_held_out_question_trains_however_it_is_written(tmp_path, capsys):
    def asked(*texts):
        return [{"question": text, "answer": "#### 1"} for text in texts]

    held = asked("It’s 5 – who?", "What is 3 - 4?")
    copies = asked("what is  3 - 4 ???", "What is 3 − 4", "  it's 5 - WHO?!")
    others = asked("What is 3 + 4?", "What is 3 - 4.5?", "What is 3 - 45?", "What is -3 - 4?")
    write(
        tmp_path,
        {
            "train.jsonl": copies + others + others[:1],
            "validation.jsonl": [*held, *HELD],
            "test.jsonl": held[1:] + TEST,
        },
    )
    pool = data.load_pool(external("gsm8k", tmp_path, train=10, validation=60, test=60))
    assert {row["prompt"] for row in pool if row["split"] == "train"} == {row["question"] for row in others}
    assert held[1]["question"] not in {row["prompt"] for row in pool if row["split"] == "validation"}
    assert (
        "left out 1 of validation that repeat test, 2 of train that repeat test, 1 of train that repeat validation, "
        "1 of train that repeat train" in capsys.readouterr().out
    )


def test_each_split_has_as_many_of_each_system_as_asked_for(tmp_path, capsys):
    settings = external("gsm8k", write(tmp_path, {"train.jsonl": A}), system1={"train": 9, "validation": 4, "test": 3})
    assert counts(data.load_pool(settings)) == {"train": (9, 4), "validation": (4, 1), "test": (3, 1)}
    assert (
        capsys.readouterr().out
        == "pool: gsm8k: train 13 (System 1: 9, System 2: 4); validation 5 (System 1: 4, System 2: 1); "
        "test 4 (System 1: 3, System 2: 1)\n"
    )


def test_the_other_system_fills_up_where_one_has_too_few(tmp_path, capsys):
    rows = A[1::2] + B[1::2] + A[:16:2]
    pool = data.load_pool(external("gsm8k", write(tmp_path, {"train.jsonl": rows}), train=20, validation=5, test=5))
    assert counts(pool) == {"train": (5, 35), "validation": (1, 9), "test": (2, 8)}
    assert "too few rows of System 1 for train, validation, test: System 2 fills up" in capsys.readouterr().out


def test_too_few_rows_are_shared_in_proportion(tmp_path, capsys):
    asked = {"train": 256, "validation": 80, "test": 150}
    rows = questions("a", 470)
    pool = data.load_pool(external("gsm8k", write(tmp_path / "none", {"train.jsonl": rows}), **asked))
    assert counts(pool) == {"train": (124, 124), "validation": (39, 39), "test": (72, 72)}
    said = capsys.readouterr().out
    assert "470 rows for train, validation, test, 972 asked for: shared in proportion" in said
    assert "train 248 of 512 asked for (System 1: 124, System 2: 124)" in said
    # A test split of the source's own is not what training rows make up for.
    folder = write(tmp_path / "own", {"train.jsonl": rows, "test.jsonl": TEST})
    pool = data.load_pool(external("gsm8k", folder, **asked))
    assert counts(pool) == {"train": (179, 179), "validation": (56, 56), "test": (30, 30)}
    assert "test 60 of 300 asked for" in capsys.readouterr().out


def test_a_split_that_would_be_empty_is_refused_and_an_empty_system_is_named(tmp_path, capsys):
    with pytest.raises(InputError, match=r"none is left for validation: gsm8k: train 2 of 8 .* lower pool.system1 and"):
        data.load_pool(external("gsm8k", write(tmp_path / "3", {"train.jsonl": A[:3]})))
    data.load_pool(external("gsm8k", write(tmp_path / "half", {"train.jsonl": A, "test.jsonl": TEST[::2]})))
    assert "pool: no row of System 2 in test\n" in capsys.readouterr().out


def test_held_out_rows_stay_when_more_are_asked_for_to_train_on(tmp_path):
    write(tmp_path, {"train.jsonl": A + B})

    def held_out(**more):
        return [row for row in data.load_pool(external("gsm8k", tmp_path, **more)) if row["split"] != "train"]

    assert held_out(train=4) == held_out(train=30) != held_out(seed=1)


def test_the_other_rows_keep_their_split_when_one_is_removed_or_mended(tmp_path):
    def split_of(name, rows, **more):
        pool = data.load_pool(external("gsm8k", write(tmp_path / name, {"train.jsonl": rows}), 20, 5, 5, **more))
        return {row["prompt"]: row["split"] for row in pool}

    rows = A + B
    before = split_of("whole", rows)
    assert split_of("turned", rows[::-1]) == before
    assert split_of("mended", [row | {"answer": row["answer"].replace("2", "4")} for row in rows]) == before
    for number in (0, 59, 119):
        after = split_of(f"without {number}", rows[:number] + rows[number + 1 :])
        # One for each split, to fill the place of the one before.
        assert sum(after.get(prompt) != split for prompt, split in before.items()) <= 3
    assert split_of("whole", rows, seed=1) != before


def test_a_pool_is_read_once_and_again_when_a_file_changed(tmp_path, capsys):
    settings = external("gsm8k", write(tmp_path, {"train.jsonl": A}))
    first, again = data.load_pool(settings), data.load_pool(settings)
    assert list(first) == list(again) and capsys.readouterr().out.count("pool: gsm8k") == 1
    first.set_format("numpy")
    assert list(data.load_pool(settings)) == list(again)
    stat = (tmp_path / "train.jsonl").stat()
    # As many bytes, and the time set back: `sed -i` and `touch -r`.
    mended = [row | {"answer": row["answer"].replace("1 + 1 = 2", "1 + 1 = 3")} for row in A]
    write(tmp_path, {"train.jsonl": mended})
    os.utime(tmp_path / "train.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert all(row["solution"].startswith("1 + 1 = 3") for row in data.load_pool(settings))
    write(tmp_path, {"test.jsonl": TEST})
    assert tags(data.load_pool(settings))["test"] == {"test"}


@pytest.mark.parametrize(
    "written",
    [
        "{}\u200b",
        "\ufeff{}",
        "Q: {}",
        "Question: {}",
        "**{}**",
        "({})",
        "\u201c{}\u201d",
        "{}<br>",
        "{}\\n",
        "{}\ufe0f",
    ],
)
def test_a_test_question_in_another_dress_does_not_train(tmp_path, written, capsys):
    question = "Tom\u2019s box \u2014 the red one \u2014 holds {} pens. How many are left?"
    rows = [{"question": question.format(i), "answer": f"{i} = {i}\n#### {i}"} for i in range(40)]
    dressed = [row | {"question": written.format(row["question"])} for row in rows[:10]]
    for split, content in (("test", rows[:20]), ("train", rows[20:] + dressed)):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, content)))
    data.load_pool(external("gsm8k", tmp_path))
    assert "left out 10 of train that repeat test" in capsys.readouterr().out


def test_signs_and_points_of_numbers_tell_questions_apart():
    asked = ["What is 3 - 4?", "What is 3 + 4?", "What is 1.5?", "What is 15?", "What is 10\u00b2?", "What is 102?"]
    asked += [
        "What is (3 + 4) * 2?",
        "What is 3 + 4 * 2?",
        "What is 2*3?",
        "What is 23?",
        "What is -x + 3?",
        "What is x + 3?",
    ]
    asked += ["5!", "5", "(1,2)?", "[1,3]?"]
    assert len({splits.normalised(question) for question in asked}) == len(asked)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Where is the Café “Élysée”?", "where is the cafe elysee"),
        ("Is Tōkyō nai\u0308ve?", "Is Tokyo naïve?"),
        ("¿Cuánto es 3 + 4?", "cuanto es 3+4"),
        ("How is ﬁre spelt in the ＳＴＲＡＳＳＥ?", "How is fire spelt in the Straße?"),
        ("What is ３ − ４?", "What is 3 - 4?"),
        ("Take ½ cup.", "Take 1/2 cup."),
        ("A tube\u00a0… 5 pens.", "A tube 5 pens"),
        ("What is 6 : 3?", "What is 6:3?"),
        ("日本の首都は？", "日本の首都は"),
    ],
)
def test_accents_and_typography_tell_no_questions_apart(one, other):
    assert splits.normalised(one) == splits.normalised(other)


@pytest.mark.parametrize(
    "alike",
    [
        ["1 - 2", "1 + 2", "12", "1 2", "1 -2", "1/2", "1:2", "1..2", "1.2", "1 .2"],
        ["3.5", "35", "3 5", "-3.5", ".35", "0.35", "0.3\u03055"],
        ["10²", "102", "10⁻²", "10-2", "10₂"],
        ["1½", "11/2", "11½"],
        ["2ⁿ", "2n", "2 n!"],
        ["a = b", "a ≠ b", "a < b", "ab", "a/b", "a·b"],
        ["か", "が"],
        ["कि", "कु"],
    ],
)
def test_arithmetic_and_spelling_tell_questions_apart(alike):
    assert len({splits.normalised(f"What is {question}?") for question in alike}) == len(alike)


def test_a_file_of_a_kind_that_is_not_read_is_named(tmp_path, capsys):
    rows = [{"question": f"{i}?", "answer": f"{i} = {i}\n#### {i}"} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.xlsx").write_bytes(b"PK")
    data.load_pool(external("gsm8k", tmp_path))
    assert "test.xlsx not read, since only .json" in capsys.readouterr().out


@pytest.mark.parametrize(("path", "message"), [("", "there is no ''"), ("~nobody-here/x", "cannot be looked into")])
def test_a_blank_path_or_an_unknown_home_is_named(path, message):
    with pytest.raises(InputError, match=message):
        data.load_pool(external("gsm8k", path))
