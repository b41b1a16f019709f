import json
import subprocess
import sys

import pytest
from conftest import ROOT

from lorapar_utils import claims, statistics, tables
from lorapar_utils.errors import InputError
from lorapar_utils.records import Record, new_record, read_record, read_records, write_record
from lorapar_utils.settings import load_profile


def record(name="a", items=(), **metrics):
    return new_record(name, load_profile("smoke"), metrics=metrics, items=items, notebook="01_voting.ipynb out.ipynb")


def test_writes_and_reads_back_with_items(tmp_path):
    made = record(items=[{"id": "x", "correct": True}], accuracy=statistics.proportion([True, False]))
    path = write_record(made, tmp_path / "a.json")
    found = read_record(path)
    assert found == made and found.items == made.items
    assert set(json.loads(path.read_text())) == {"run", "result", "environment"}
    assert found.run["command"].endswith("-p profile smoke") and found.run["publishable"] is False
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", "a.items.jsonl"}


def test_a_nan_never_reaches_a_file(tmp_path):
    with pytest.raises(ValueError):
        write_record(record(accuracy={"value": float("nan"), "n": 1}), tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_damaged_and_missing_records_are_named(tmp_path):
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(InputError, match="b.json: not a record"):
        read_records(tmp_path)
    with pytest.raises(InputError, match="c.json: not there"):
        read_record(tmp_path / "c.json")
    with pytest.raises(InputError, match="no metric 'x'; it has accuracy"):
        record(accuracy={"value": 1.0, "n": 1}).metric("x")


def test_missing_stays_missing():
    assert tables.percent(None) == "not measured"


def test_proportion_is_wilsons():
    found = statistics.proportion([True] * 3 + [False] * 7)
    assert found["value"] == 0.3 and found["n"] == 10
    assert (round(found["low"], 4), round(found["high"], 4)) == (0.1078, 0.6032)


@pytest.mark.parametrize(
    ("c", "k", "expected"), [(0, 3, 0.0), (1, 1, 0.25), (1, 4, 1.0), (2, 2, 1 - 1 / 6), (4, 1, 1.0)]
)
def test_pass_at_k_is_unbiased(c, k, expected):
    assert statistics.pass_at_k(c, 4, k) == pytest.approx(expected)


def test_paired_difference_is_over_items():
    gap = statistics.paired_difference([0, 0, 1, 1] * 10, [1, 0, 1, 1] * 10)
    assert gap["value"] == 0.25 and gap["low"] > 0 and gap["p_value"] < 0.01
    with pytest.raises(InputError, match="cannot be paired"):
        statistics.paired_difference([1], [1, 0])


def outcomes(name, stage, correct):
    return record(
        name, items=[{"id": str(i), "stage": stage, "system": 1, "correct": c} for i, c in enumerate(correct)]
    )


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([True] * 40, [False] * 40, "reproduced"),
        ([False] * 40, [True] * 40, "not reproduced"),
        ([True, False] * 20, [False, True] * 20, "inconclusive"),
        ([True] * 5, [False] * 5, "inconclusive"),
    ],
)
def test_claims_are_judged_by_their_interval(first, second, verdict):
    where = {"first": {"record": "a", "stage": "stage1"}, "second": {"record": "b", "stage": "stage1"}}
    claim = {"claim": "c", "paper": "t", "min_n": 10, "test": {"kind": "greater", "margin": 0.0, **where}}
    records = {"a": outcomes("a", "stage1", first), "b": outcomes("b", "stage1", second)}
    assert claims.judge(claim, records)[0] == verdict
    assert claims.judge(claim, {})[0] == "not run"


def test_the_declared_claims_are_well_formed():
    for claim in claims.load_claims():
        assert {"claim", "paper", "min_n", "test"} == set(claim)
        assert claims.judge(claim, {})[0] == "not run"


def test_publish_refuses_smoke_and_uncommitted_records(project):
    from lorapar_utils import publish

    with pytest.raises(InputError, match="not publishable"):
        publish.publish("smoke")
    with pytest.raises(InputError, match="no records"):
        publish.publish("cpu")
    settings = load_profile("cpu")
    made = new_record("voting", settings, metrics={})
    dirty = Record(run={**made.run, "dirty": True}, result=made.result, environment=made.environment)
    write_record(dirty, settings.runs / "records" / "voting.json")
    with pytest.raises(InputError, match="uncommitted changes"):
        publish.publish("cpu")
    assert not (project / "results").exists()


def test_figures_need_no_torch():
    code = (
        "import sys, lorapar_utils.plots, lorapar_utils.tables, lorapar_utils.claims; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.skipif(not (ROOT / "results" / "cpu").is_dir(), reason="no results are published yet")
def test_published_records_are_publishable():
    for found in read_records(ROOT / "results" / "cpu").values():
        assert found.run["publishable"] and found.run["dirty"] is False and found.run["profile"] == "cpu"


@pytest.mark.skipif(not (ROOT / "results" / "cpu").is_dir(), reason="no results are published yet")
def test_readme_shows_what_the_published_records_say():
    from lorapar_utils.publish import readme_with_results

    readme = (ROOT / "README.md").read_text()
    assert readme_with_results(readme, read_records(ROOT / "results" / "cpu")) == readme
