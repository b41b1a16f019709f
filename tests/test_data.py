import json
import re

import pytest
from conftest import ROOT

from lorapar_utils import data
from lorapar_utils.errors import InputError
from lorapar_utils.settings import load_profile

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"


@pytest.fixture(scope="module")
def pool():
    return list(data.load_pool(load_profile("cpu")))


def test_splits_have_their_sizes_and_share_no_prompt(pool):
    sizes = load_profile("cpu").pool
    for split in data.SPLITS:
        rows = [row for row in pool if row["split"] == split]
        for system in (1, 2):
            count = sum(data.construction_system(row["steps"]) == system for row in rows)
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


def external(source, path, train=4, validation=1, test=1):
    one = {"train": train, "validation": validation, "test": test}
    return load_profile("smoke", pool={"source": source, "path": str(path), "system1": one, "system2": one})


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not beside the project")
def test_gsm8k_from_a_local_folder():
    rows = list(data.load_pool(external("gsm8k", GSM8K, 50, 10, 20)))
    assert [sum(row["split"] == split for row in rows) for split in data.SPLITS] == [100, 20, 40]
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all(row["solution"].endswith(f"#### {row['answer']}") and row["steps"] > 0 for row in rows)


ROWS = {
    "dolly-15k": {"instruction": "Name a colour {}.", "context": "", "response": "Blue", "category": "open_qa"},
    "open-platypus": {"instruction": "Add 1 to {}.", "input": "", "output": "Done", "data_source": "x"},
    "codealpaca-20k": {"instruction": "Print {}.", "input": "in Python", "output": "print()"},
}


@pytest.mark.parametrize("source", ROWS)
def test_other_sources_load_from_a_folder_in_the_hub_layout(source, tmp_path):
    rows = [{k: v.format(i) if k == "instruction" else v for k, v in ROWS[source].items()} for i in range(12)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pool = list(data.load_pool(external(source, tmp_path)))
    assert [sum(row["split"] == split for row in pool) for split in data.SPLITS] == [8, 2, 2]
    assert set(pool[0]) == set(data.COLUMNS) and {row["steps"] for row in pool} == {-1}


def test_missing_folder_and_malformed_row_are_named(tmp_path):
    with pytest.raises(InputError, match=r"pool.path: .* holds no .json"):
        data.load_pool(external("gsm8k", tmp_path))
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "2 + 2?", "answer": "four"}))
    with pytest.raises(InputError, match=r"pool.path: row 0 of gsm8k \(train\) is malformed"):
        data.load_pool(external("gsm8k", tmp_path))
