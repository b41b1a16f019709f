import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import scipy
from conftest import ROOT

from lorapar_utils.errors import InputError
from lorapar_utils.records import (
    Record,
    intervals,
    new_record,
    published_votes,
    read_record,
    read_records,
    record_link,
    study,
    write_record,
)
from lorapar_utils.records.intervals import Metric
from lorapar_utils.report import book, claims, exports, figures, notebook, publish, tables
from lorapar_utils.settings import load_profile


def record(name="a", items=(), seed=0, parameters=None, **metrics):
    settings = load_profile("smoke", seed=seed)
    return new_record(
        name, settings, metrics=metrics, items=items, parameters=parameters, notebook="01_voting.ipynb out.ipynb"
    )


def test_writes_and_reads_back_with_items(tmp_path):
    made = record(items=[{"id": "x", "correct": True}], accuracy=intervals.proportion([True, False]))
    path = write_record(made, tmp_path / "a.json")
    found = read_record(path)
    assert found == made and found.items == made.items
    assert set(json.loads(path.read_text())) == {"run", "result", "environment"}
    assert found.run["command"].endswith("-p profile smoke") and found.run["publishable"] is False
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", "a.items.jsonl"}


def test_a_nan_never_reaches_a_file(tmp_path):
    with pytest.raises(ValueError):
        write_record(record(accuracy=Metric(float("nan"), 1)), tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_damaged_and_missing_records_are_named(tmp_path):
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(InputError, match="b.json: not a record"):
        read_records(tmp_path)
    with pytest.raises(InputError, match="c.json: not there"):
        read_record(tmp_path / "c.json")
    with pytest.raises(InputError, match="no metric 'x'; it has accuracy"):
        record(accuracy=Metric(1.0, 1)).metric("x")


def test_missing_stays_missing():
    assert tables.written(None) == "not measured"


def test_proportion_is_wilsons():
    found = intervals.proportion([True] * 3 + [False] * 7)
    assert found.value == 0.3 and found.n == 10
    assert (round(found.low, 4), round(found.high, 4)) == (0.1078, 0.6032)


@pytest.mark.parametrize(
    ("c", "k", "expected"), [(0, 3, 0.0), (1, 1, 0.25), (1, 4, 1.0), (2, 2, 1 - 1 / 6), (4, 1, 1.0)]
)
def test_pass_at_k_is_unbiased(c, k, expected):
    assert intervals.pass_at_k(c, 4, k) == pytest.approx(expected)


def test_paired_difference_is_over_items():
    gap = intervals.paired_difference([0, 0, 1, 1] * 10, [1, 0, 1, 1] * 10)
    assert gap.value == 0.25 and gap.low > 0 and gap.p_value < 0.01
    with pytest.raises(InputError, match="cannot be paired"):
        intervals.paired_difference([1], [1, 0])


def outcomes(name, stage, correct, seed=0):
    items = [{"id": str(i), "stage": stage, "system": 1, "correct": c} for i, c in enumerate(correct)]
    return record(name, items=items, seed=seed)


def sides(**endpoint):
    where = {"first": {"record": "a", "stage": "stage1"}, "second": {"record": "b", "stage": "stage1"}}
    return {
        "claim": "c",
        "paper": "t",
        "test": {"kind": "greater", "margin": 0.0, "endpoint": "accuracy"} | where | endpoint,
    }


def blocks_of(**rights):
    """Records of five blocks: of 40 test items, so many right as an arm's list says."""
    return {
        f"{arm}-seed{seed}": outcomes(f"{arm}-seed{seed}", "stage1", [i < right for i in range(40)], seed)
        for arm, counts in rights.items()
        for seed, right in enumerate(counts)
    }


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([30, 31, 32, 30, 31], [20, 22, 20, 21, 20], "reproduced"),
        ([20, 22, 20, 21, 20], [30, 31, 32, 30, 31], "not reproduced"),
        ([30, 10, 30, 10, 20], [20, 20, 20, 20, 20], "inconclusive"),
        ([40] * 4, [0] * 4, "inconclusive"),  # one block too few, whatever the effect
    ],
)
def test_claims_are_judged_over_blocks(first, second, verdict):
    records = blocks_of(a=first, b=second)
    judged = claims.judge(sides(), records)
    assert judged.verdict == verdict and judged.seeds == len(first)
    assert claims.judge(sides(), {}).verdict == "not run"


def test_the_interval_over_blocks_is_students_and_stands_beside_that_over_questions():
    judged = claims.judge(sides(), blocks_of(a=[30, 31, 32, 30, 31], b=[20, 22, 20, 21, 20]))
    gaps = np.array([10, 9, 12, 9, 11]) / 40
    reach = scipy.stats.t.ppf(0.975, 4) * gaps.std(ddof=1) / 5**0.5
    assert judged.effect.value == pytest.approx(gaps.mean())
    assert (judged.effect.low, judged.effect.high) == pytest.approx((gaps.mean() - reach, gaps.mean() + reach))
    assert judged.over_items.n == 40 and judged.over_items.value == pytest.approx(gaps.mean())
    assert claims.written(sides(), judged).startswith("+25.5 points, [+21.5, +29.5] over blocks, [")


def test_a_block_that_one_side_lacks_is_left_out():
    records = blocks_of(a=[30] * 6, b=[20] * 5)
    assert claims.judge(sides(), records).seeds == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": {"commit": "other"}}, "block 2: its records differ in commit .*b-seed2: other"),
        ({"environment": {"dtype": "float32"}}, "block 2: its records differ in dtype"),
        ({"environment": {"hashes": {"data": "x"}}}, "block 2: its records differ in pool"),
        ({"environment": {"hashes": {"weights": "x"}}}, "block 2: its records differ in weights"),
        ({"environment": {"hardware": {"cpu": "another"}}}, "block 2: its records differ in kind of machine"),
    ],
)
def test_a_mixed_block_is_refused(change, message):
    records = blocks_of(a=[30] * 5, b=[20] * 5)
    mixed = records["b-seed2"]
    for part, values in change.items():
        getattr(mixed, part).update(values)
    with pytest.raises(InputError, match=message):
        claims.judge(sides(), records)


def test_records_that_chose_settings_are_refused_as_evidence():
    records = blocks_of(a=[30] * 5, b=[20] * 5)
    records["a-seed1"].run["parameters"]["measured_on"] = "validation"
    with pytest.raises(InputError, match="a-seed1: it was measured on validation, to choose settings"):
        claims.judge(sides(), records)


def test_losses_and_single_systems_are_endpoints_too():
    records = blocks_of(a=[1] * 5, b=[1] * 5)
    for name, one in records.items():
        for i, item in enumerate(one.items):
            item |= {"system": 1 + i % 2, "loss": (0.5 if name[0] == "a" else 0.2) + 0.001 * one.run["seed"]}
    judged = claims.judge(sides(endpoint="loss2"), records)
    assert judged.verdict == "reproduced" and judged.over_items.n == 20
    assert claims.written(sides(endpoint="loss2"), judged).startswith("+0.300 nats")
    with pytest.raises(InputError, match="endpoint = 'speed'"):
        claims.judge(sides(endpoint="speed"), records)


def test_what_the_records_do_not_measure_is_not_judged_and_what_one_side_lacks_is_refused():
    # Open answers have a loss and no accuracy; the data set may have no System 2.
    records = blocks_of(a=[1] * 5, b=[1] * 5)
    judged = claims.judge(sides(endpoint="system2"), records)
    assert (judged.verdict, judged.why) == ("not run", "the records have no system2")
    for item in records["b-seed3"].items:
        item["system"] = 2
    with pytest.raises(InputError, match="a-seed3, b-seed3 do not have one set of system2"):
        claims.judge(sides(endpoint="system2"), records)
    for item in records["a-seed3"].items:
        item["system"] = 2
    with pytest.raises(InputError, match="claim 'c': its blocks do not have one set of system2"):
        claims.judge(sides(endpoint="system2"), records)


def test_holms_correction_is_over_the_claims_of_a_table():
    records = blocks_of(a=[30, 24, 33, 25, 29], b=[20, 24, 26, 22, 20], c=[20] * 5, d=[20, 19, 21, 20, 20])
    weak = sides()
    alone = claims.judgements(records, [weak])[0]
    others = [
        {
            **weak,
            "test": {
                **weak["test"],
                "first": {"record": "c", "stage": "stage1"},
                "second": {"record": "d", "stage": "stage1"},
            },
        }
    ] * 9
    assert alone.verdict == "reproduced"
    corrected = claims.judgements(records, [weak, *others])[0]
    assert corrected.verdict == "inconclusive" and "after Holm's correction over 10 claims" in corrected.why
    not_run = [sides(first={"record": "not run", "stage": "stage1"})] * 9
    assert claims.judgements(records, [weak, *not_run])[0].verdict == "inconclusive"
    elsewhere = [{**other, "paper": "another"} for other in others]
    assert claims.judgements(records, [weak, *elsewhere])[0].verdict == "reproduced"


def test_diminishing_returns_compare_two_gains():
    three = {key: {"record": key, "stage": "stage1"} for key in ("low", "middle", "high")}
    claim = {"claim": "c", "paper": "t", "test": {"kind": "concave", "margin": 0.0, "endpoint": "accuracy", **three}}

    def verdict(low, middle, high):
        jitter = [0, 1, 0, 1, 0]
        records = blocks_of(low=[low] * 5, middle=[middle + j for j in jitter], high=[high - j for j in jitter])
        return claims.judge(claim, records).verdict

    assert verdict(0, 30, 40) == "reproduced" and verdict(0, 10, 40) == "not reproduced"


def test_what_a_model_without_two_systems_passes_could_not_fail():
    test = {"kind": "within", "first": {"record": "a", "metric": "x"}, "low": 0.3, "high": 0.6}
    one = record("a-seed0", x=Metric(0.4, 1))
    one.result["tables"]["map"] = [{"elements": 5000, "system1": 1.0, "system2": 1.0} for _ in range(20)]

    def judged(**more):
        return claims.judge({"claim": "c", "paper": "t", "test": test | more}, {"a-seed0": one})

    assert judged().verdict == "reproduced"
    could_not = judged(without_systems="jaccard", theta=0.9)
    assert could_not.verdict == "could not fail" and "and so passes too" in could_not.why
    # At theta 0.1 such a model has almost no overlap, so the claim could have failed there.
    assert judged(without_systems="jaccard", theta=0.1).verdict == "reproduced"
    assert judged(high=0.35).verdict == "not reproduced"


def test_a_base_model_at_chance_leaves_no_headroom():
    records = blocks_of(a=[10] * 5, b=[10] * 5) | {"base-seed0": record("base-seed0", x=Metric(0.24, 100))}
    claim = sides() | {"base": {"record": "base", "metric": "x", "at_most": 0.26}}
    judged = claims.judge(claim, records)
    assert judged.verdict == "no headroom" and "24.0 %" in judged.why
    records["base-seed0"].result["metrics"]["x"]["value"] = 0.5
    assert claims.judge(claim, records).verdict == "inconclusive"


def test_a_verdict_rests_on_the_published_records_and_this_run_stands_beside():
    published = blocks_of(a=[30, 31, 32, 30, 31], b=[20, 22, 20, 21, 20])
    own = blocks_of(a=[0], b=[40])
    row = claims.scoreboard(published, [sides()], own=own).iloc[0]
    assert row["verdict"] == "reproduced" and row["this run"].startswith("-100.0 points")
    assert "this run" not in claims.scoreboard(published, [sides()])
    assert claims.scoreboard(published, [sides()], own={"a-seed0": own["a-seed0"]}).iloc[0]["this run"] == "–"


def test_a_table_of_teachers_names_its_measures_and_abstentions_where_there_are_any():
    voting = published_votes()["voting"]
    shown = notebook.shown(tables.agreement_table(voting)).to_html()
    assert "undecided, left out" in shown and "Fleiss" in shown
    assert not any("abstained" in column for column in tables.teacher_table(voting))
    silent = record("voting", **{"accuracy/tutor": intervals.proportion([True]), "abstained/tutor": Metric(0.5, 2)})
    assert any("abstained" in column for column in tables.teacher_table(silent))


def test_an_index_with_names_and_two_rows_of_heads_become_columns_and_names():
    frame = pd.DataFrame({"n": [1, 2], "system": [1, 2], "kappa": [0.5, 0.25]})
    shown = notebook.shown(frame.pivot_table(index="n", columns="system", values=["kappa"])).to_html()
    assert [head for head in ("n", "kappa, 1", "kappa, 2") if f">{head}</th>" in shown] == ["n", "kappa, 1", "kappa, 2"]


def test_this_runs_arms_of_two_commits_are_not_compared_and_the_page_is_drawn():
    own = blocks_of(a=[0], b=[40])
    own["b-seed0"].run["commit"] = "another"
    row = claims.scoreboard(blocks_of(a=[30] * 5, b=[20] * 5), [sides()], own=own).iloc[0]
    assert row["this run"].startswith("– (") and "differ in commit" in row["this run"]


def test_a_record_whose_items_are_cut_off_is_named_and_half_written_ones_are_not_read(tmp_path):
    write_record(trained("lora", 0, ["sft"], 20), tmp_path / "lora-seed0.json")
    (tmp_path / ".lora-seed1.json.1a2b3c4d").write_text("{")
    (tmp_path / ".half.json").write_text("{")
    assert list(read_records(tmp_path)) == ["lora-seed0"]
    items = tmp_path / "lora-seed0.items.jsonl"
    items.write_text(items.read_text()[:-20])
    with pytest.raises(InputError, match="lora-seed0.json: not a record"):
        read_records(tmp_path)


def trained(method, seed, stages, right, *, stage="stage1", **more):
    """A record of a method whose first `right` of 40 test items are correct at the end."""
    parameters = {"method": method, "init": "normal", "stages": stages, "title": method, "selection": "importance"}
    parameters |= {"theta": 0.9, "alpha": 1.0, "beta": 1.0, "split_by": None, "panel": None, "sweep": "baseline"} | more
    items = [
        {"id": str(i), "stage": stage, "system": 1 + i % 2, "correct": i < right, "truncated": i >= 30}
        for i in range(40)
    ]
    metrics = {f"{stage}/accuracy": intervals.proportion([item["correct"] for item in items])}
    metrics |= {f"active/{stage}": Metric(0.4, 100), f"{stage}/train_seconds": Metric(5.0, 1)}
    return record(f"{method}-seed{seed}", items=items, seed=seed, parameters=parameters, **metrics)


def test_benchmark_table_pairs_each_method_with_lora_and_leaves_out_what_was_not_run():
    rows = tables.benchmark_table(
        [
            trained("lora", 0, ["sft_all"], 20),
            trained("lora", 1, ["sft_all"], 40),
            trained("ia3", 0, ["sft_all"], 10),
            trained("lorapar", 0, ["sft", "grpo"], 30, stage="stage2"),
            # Ablations of LoRA-PAR are not LoRA-PAR.
            trained("lorapar", 1, ["sft", "grpo"], 0, stage="stage2", theta=0.5),
            trained("lorapar", 2, ["grpo", "sft"], 0, stage="stage2"),
            trained("lorapar", 3, ["sft", "grpo"], 0, stage="stage2", split_by="random"),
        ]
    ).set_index("method")
    assert rows.loc["LoRA", "at the end"].startswith("75.0 %") and rows.loc["LoRA", "seeds"] == 2
    assert rows.loc["IA3", "gap to LoRA"].startswith("-25.0 [")
    assert rows.loc["LoRA-PAR over LoRA", "gap to LoRA"].startswith("+25.0 [")
    assert rows.loc["LoRA-PAR over LoRA", "seeds"] == 1
    assert rows.loc["IA3", "truncated"] == "25.0 %"
    assert rows.loc["IA3", "paper, epoch 2 %"] == 26.46 and "PiSSA" not in rows.index
    lower = trained("lora", 0, ["sft_all"], 0, r=3)
    assert tables.benchmark_table([lower, trained("lora", 0, ["sft_all"], 20, r=8)])["at the end"][0].startswith("50")


def test_the_orders_of_stages_are_compared_at_the_seeds_that_both_have():
    first = [trained("lorapar", seed, ["sft", "grpo"], right, stage="stage2") for seed, right in ((0, 20), (1, 40))]
    rows = tables.order_table([*first, trained("lorapar", 0, ["grpo", "sft"], 10, stage="stage2")])
    assert rows["schedule"].tolist() == ["SFT then RL", "RL then SFT"] and rows["seeds"].tolist() == [2, 1]
    assert rows["gap to SFT then RL"].tolist()[0] == "–" and rows["gap to SFT then RL"].tolist()[1].startswith(
        "-25.0 ["
    )


PAR = {"method": "lorapar", "selection": "importance", "theta": 0.9, "stages": ["sft", "grpo"]}


def cell(alpha, beta, seed, right):
    """A cell of Table 2 whose first `right` of 40 test items are correct after either stage."""
    items = [
        {"id": str(i), "stage": stage, "system": 1 + i % 2, "correct": i < right}
        for stage in ("stage1", "stage2")
        for i in range(40)
    ]
    active = {f"active/stage{k}": Metric(share, 100) for k, share in ((1, alpha / 2), (2, beta / 2))}
    return record(
        f"a{alpha}b{beta}-seed{seed}",
        items=items,
        seed=seed,
        parameters={"alpha": alpha, "beta": beta, **PAR},
        **active,
    )


def test_cells_of_table_2_are_compared_with_the_whole_shared_region_at_common_seeds():
    cells = [cell(1.0, 1.0, 0, 20), cell(1.0, 1.0, 1, 40), cell(0.5, 1.0, 1, 30), cell(0.0, 0.0, 2, 0)]
    rows = tables.alpha_beta_table(cells).set_index(["alpha", "beta"])
    assert rows["seeds"].tolist() == [1, 1, 2]
    assert rows.loc[(1.0, 1.0), "after RL"].startswith("75.0 %")
    gaps = rows["gap to alpha = beta = 1"]
    assert gaps[(1.0, 1.0)] == "–" and gaps[(0.0, 0.0)] == "no seed in common"
    assert gaps[(0.5, 1.0)].startswith("-25.0 [")
    assert rows.loc[(0.5, 1.0), "paper, after RL %"] == 31.01


def test_every_row_of_a_table_links_the_records_that_it_was_made_from(monkeypatch):
    runs = [trained("lora", seed, ["sft_all"], 20) for seed in (0, 1)] + [trained("ia3", 0, ["sft_all"], 10)]
    frame = tables.benchmark_table(runs)
    page = notebook.linked(frame, runs, load_profile("smoke")).to_html()
    rows = {re.search(r">([^<]+)</td>", row)[1]: row for row in page.split("<tr>")[2:]}
    assert ", each seed" not in page and notebook.DOTS in page and "<th" in page and ">seeds<" not in page
    hrefs = re.findall(r'href="([^"]+)" title="50.0: (lora-seed.) of profile', rows["LoRA"])
    assert [(Path(href).name, name) for href, name in hrefs] == [
        (f"lora-seed{s}.json", f"lora-seed{s}") for s in (0, 1)
    ]
    assert re.search(r">[\d.]+\xa0% \[[\d.]+,\xa0[\d.]+\], n\xa0=\xa0\d+<", rows["IA3"])  # lines break at two places
    assert "ia3-seed0.json" in rows["IA3"]
    titled = record("a", parameters={"title": "r < 8"}, **{"base/accuracy": intervals.proportion([True])})
    assert "r &lt; 8" in notebook.linked(tables.stage_table([titled]), [titled], load_profile("smoke")).to_html()
    said = []
    monkeypatch.setattr(notebook, "display", lambda markdown, metadata: said.append(markdown.data))
    assert notebook.linked(tables.theta_table([]), [], load_profile("smoke")) is None and said == ["No record yet."]


def test_a_seed_without_a_score_has_no_dot_and_moves_none():
    runs = [trained("lora", seed, ["sft_all"], right) for seed, right in ((0, 10), (1, 20), (2, 30))]
    for item in runs[1].items:
        item["stage"] = "elsewhere"
    frame = tables.benchmark_table(runs)
    assert frame.set_index("method").loc["LoRA", "at the end, each seed"] == "25.0, –, 75.0"
    page = notebook.linked(frame, runs, load_profile("smoke")).to_html()
    assert re.findall(r'title="([\d.]+): (lora-seed.)', page) == [("25.0", "lora-seed0"), ("75.0", "lora-seed2")]


def test_values_of_single_seeds_are_dots_that_are_links_and_columns_without_a_value_are_left_out():
    def arm(selection, seed, right):
        more = {"sweep": "theta", "selection": selection, "theta": 0.9, "modules": "GUD"}
        one = trained("lorapar", seed, ["sft"], right, **more)
        one.metrics["active/stage1"] = Metric(0.4, 10)
        return one

    runs = [arm("importance", 0, 20), arm("importance", 1, 30), arm("swapped", 0, 10)]
    page = notebook.linked(tables.theta_table(runs), runs, load_profile("smoke")).to_html()
    rows = [re.sub("<.*?>", " ", row) for row in page.split("<tr>")]
    assert any("importance" in row and "62.5\xa0%" in row for row in rows), rows
    assert any("other system" in row and "25.0\xa0%" in row for row in rows), "a control counts as importance"
    # From the least value of the column, 25 %, to the greatest, 75 %.
    places = re.findall(r'title="([\d.]+): (lorapar-seed.).*?left: (\d+)%', page)
    assert places == [("50.0", "lorapar-seed0", "45"), ("75.0", "lorapar-seed1", "90"), ("25.0", "lorapar-seed0", "0")]
    assert "lorapar-seed1.json" in page and "<th" in page
    assert "records" not in rows[1]


def test_a_share_of_nothing_but_misses_has_an_interval_with_width():
    nothing = intervals.share([0.0] * 150)
    assert nothing.value == nothing.low == 0.0 and nothing.high == pytest.approx(0.025, abs=1e-3)
    assert intervals.share([0, 1, 1]) == intervals.proportion([0, 1, 1])
    assert intervals.share([0, 0.5, 1]) == intervals.mean([0, 0.5, 1])


def test_macro_average_weighs_groups_alike():
    found = intervals.macro_average([("a", True)] * 30 + [("a", False)] * 10 + [("b", False)] * 4)
    assert found.value == 0.375 and found.n == 44
    # Only group a varies: its standard error of 0.068, halved.
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.068 / 2, rel=0.2)
    with pytest.raises(InputError, match="none to take a share of"):
        intervals.macro_average([])


def test_tables_are_exported_in_three_formats(tmp_path):
    records = {r.name: r for r in [trained("lora", 0, ["sft_all"], 20), trained("a_b&c", 0, ["sft_all"], 20)]}
    written = {path.name for path in exports.save_all(records, tmp_path)}
    assert {
        "table4_methods.html",
        "table4_methods.csv",
        "table4_methods.tex",
        "study_stage2.csv",
        "stages.tex",
    } <= written
    latex = (tmp_path / "stages.tex").read_text()
    assert r"\toprule" in latex and r"a\_b\&c" in latex
    assert "table7_order.csv" not in written
    assert not list(tmp_path.glob(".*"))


def test_theta_points_count_each_seed_once_and_theta_1_is_all_elements():
    def run(name, seed, theta, method="lorapar", **more):
        parameters = {"modules": "QKVGUD", "theta": theta, "method": method, "selection": "importance", **more}
        metrics = {"stage1/accuracy": Metric(0.5, 2), "active/stage1": Metric(theta, 9)}
        items = [{"id": str(i), "stage": "stage1", "system": 1, "correct": i == 0} for i in range(2)]
        return record(name, items=items, seed=seed, parameters=parameters, **metrics)

    points = tables.theta_points(
        [
            run("lorapar-seed0", 0, 0.9),
            run("theta_0.9-seed0", 0, 0.9),
            run("theta_0.9-seed1", 1, 0.9),
            run("theta_1.0-seed0", 0, 1.0),
            run("lora_rl-seed1", 1, 0.9, "lora"),
            run("by_random-seed0", 0, 0.9, score="random"),
        ]
    )
    assert {(p["theta"], p["selection"]): len(p["seeds"]) for p in points} == {
        (0.9, "importance"): 2,
        (0.9, "random scores"): 1,
        (1.0, "all elements"): 2,
    }


def test_the_declared_claims_are_well_formed():
    for claim in claims.load_claims():
        assert {"claim", "paper", "test"} <= set(claim) <= {"claim", "paper", "test", "min_seeds", "base"}
        assert claims.judge(claim, {}).verdict == "not run"


def test_a_verdict_links_to_every_record_that_it_rests_on(tmp_path, monkeypatch):

    records = blocks_of(a=[3, 3], b=[3])
    missing = sides(second={"record": "c", "stage": "stage1"})
    assert claims.scoreboard(records, [sides(), missing])["evidence"].tolist() == [
        "a (seed 0, seed 1); b (seed 0)",
        "a (seed 0, seed 1); c (no record)",
    ]
    claim = sides()
    assert claims.scoreboard(records, [claim, missing], run=True)["claim"].tolist() == [claim["claim"]]
    assert claims.scoreboard(records, [claim, missing], run=False)["claim"].tolist() == [missing["claim"]]
    assert claims.scoreboard({}, [claim], own=records, run=True)["claim"].tolist() == [claim["claim"]]
    monkeypatch.setattr(notebook, "study", lambda: records)
    shown = notebook.scoreboard(load_profile("smoke"), [claim]).to_html()
    assert 'href="runs/smoke/records/a-seed1.json"' in shown
    executed = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell()])
    executed.cells[0].outputs = [nbformat.v4.new_output("display_data", {"text/html": shown})]
    nbformat.write(executed, tmp_path / "in.ipynb")
    book._write_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", tmp_path)
    staged = nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs[0].data["text/html"]
    assert 'href="_static/records/smoke/a-seed1.json"' in staged and "runs/" not in staged


def test_the_records_behind_a_page_are_one_row_an_experiment_with_a_link_for_each_seed():
    made = [record("a-seed1", seed=1), record("a-seed0"), record("voting"), record("a-seed0")]
    shown = notebook.sources(made, load_profile("smoke"))
    assert shown.data["profile"].tolist() == ["smoke", "smoke"]
    first, second = shown.data["record"]
    assert re.sub("<.*?>", "", first) == "a (seed 0, seed 1)" and re.sub("<.*?>", "", second) == "voting"
    assert first.count('href="runs/smoke/records/a-seed') == 2 and "commit" in second
    tuned = [replace(one, run=one.run | {"parameters": {"sweep": "tuning"}}) for one in made[:2]]
    table = book.status_table([*made, *tuned], lambda one: one.name)
    assert [re.sub("<.*?>", "", row) for row in table["record"]] == [
        "a (seed 0, seed 0, seed 1)",
        "voting",
        "tuning 1, 2",
    ]
    elsewhere = notebook.sources(made, load_profile("laptop"))
    assert 'href="results/smoke/voting.json"' in elsewhere.data["record"][1]


def test_a_published_record_is_linked_where_nothing_has_been_run(project):
    settings = load_profile("smoke")
    made = record("a-seed0")
    write_record(made, project / "results/smoke/a-seed0.json")
    assert 'href="results/smoke/a-seed0.json"' in notebook.sources([made], settings).to_html()
    write_record(made, settings.runs / "records/a-seed0.json")
    assert 'href="runs/smoke/records/a-seed0.json"' in notebook.sources([made], settings).to_html()


def test_links_lead_from_the_folder_that_the_notebook_was_started_in(project, monkeypatch):
    settings = load_profile("smoke")
    for folder in ("notebooks", "runs"):
        (project / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(project / folder)
        address = record_link(record("a-seed0"), settings)
        assert Path(address).resolve() == settings.runs / "records/a-seed0.json" and not Path(address).is_absolute()


def test_publish_refuses_smoke_and_uncommitted_records(project):

    with pytest.raises(InputError, match="not publishable"):
        publish.publish("smoke")
    with pytest.raises(InputError, match="no records"):
        publish.publish("laptop")
    settings = load_profile("laptop")
    made = new_record("voting", settings, metrics={})
    dirty = Record(run={**made.run, "dirty": True}, result=made.result, environment=made.environment)
    write_record(dirty, settings.runs / "records" / "voting.json")
    with pytest.raises(InputError, match="uncommitted changes"):
        publish.publish("laptop")
    assert not (project / "results").exists()


def test_an_effect_on_a_page_tells_interval_blocks_verdict_and_commit(monkeypatch):
    records = blocks_of(a=[30, 31, 32, 30, 31], b=[20, 22, 20, 21, 20])
    unpaired = outcomes("a-seed9", "stage1", [True] * 40, seed=9)
    unpaired.run["commit"] = "another"
    monkeypatch.setattr(book, "study", lambda: records | {"a-seed9": unpaired})
    missing = sides(second={"record": "c", "stage": "stage1"}) | {"claim": "d"}
    monkeypatch.setattr(claims, "load_claims", lambda: [sides(), missing])
    context = book.page_context(load_profile("smoke"))
    text = book.render('{{ effect("c") }}, {{ verdict("c") }}, {{ effect("d") }}', context, "page.md")
    assert "+25.5 points, [+21.5, +29.5] over blocks (5 blocks)</a>: *reproduced*, *reproduced*, not run yet" in text
    commit = str(records["a-seed0"].run["commit"])[:10]
    assert f'title="seeds 0, 1, 2, 3, 4 of a, b; commit {commit}"' in text and context["compared"]
    for reach, equal in ((0.3, True), (0.29, False)):
        monkeypatch.setattr(claims, "EQUAL_WITHIN", reach)
        assert context["equal"]("c") == equal and not context["equal"]("d")


@pytest.mark.parametrize("name", ["gpu-h100-second.json", "gpu-h100-third.json"])
def test_the_page_on_gpus_shows_every_part_that_was_measured(name):
    measured = json.loads((ROOT / "book" / "_static" / name).read_text())
    text = book.to_markdown(book.gpu_table(name))
    seconds = [part["seconds_a_step"] for stage in ("sft", "grpo") for part in measured.get(stage, ())]
    seconds += [measured["scoring"]["seconds"]["batched"], measured["training"]["seconds"]["lora_par"]]
    seconds += [measured["rollout"]["seconds"]["complete"]] if "rollout" in measured else []
    assert text.count("\n") == len(seconds) + 1 and all(f"| {taken:.3f} |" in text for taken in seconds)


def test_figures_need_no_torch():
    code = "import sys, lorapar_utils.report.figures, lorapar_utils.report.tables, lorapar_utils.report.claims; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "folder", sorted((ROOT / "results").iterdir()), ids=lambda folder: str(folder.relative_to(ROOT))
)
def test_published_records_are_publishable(folder):
    adapters = [read_record(path) for path in folder.glob("adapters/*/record.json")]
    for found in (*read_records(folder).values(), *adapters):
        assert found.run["publishable"] and found.run["dirty"] is False and found.run["profile"] == folder.name


def test_readme_shows_what_the_published_records_say():
    from lorapar_utils.report.publish import readme_with_results

    readme = (ROOT / "README.md").read_text()
    assert readme_with_results(readme, study().values()) == readme


BEHIND = "After SFT alone LoRA-PAR is behind LoRA (27.30 against 30.63 in the paper)"
# Claims that the study decides -> what README says of each, in words. Who changes one reads README's paragraph again.
SAID_IN_README = {
    BEHIND: (
        "reproduced",
        "LoRA-PAR is behind LoRA with all elements, as in the paper, by less than a hundredth of a nat (six blocks;",
    ),
    "LoRA-PAR is no worse than LoRA with all elements after both stages (margin 2 points)": (
        "reproduced",
        "After both stages LoRA-PAR is no worse than LoRA with all elements by more than two points",
    ),
    "Stage 2 (GRPO) costs System 1 nothing (margin 2 points)": (
        "not reproduced",
        "Stage 2 costs it more than two points on System 1",
    ),
}


def test_readme_says_in_words_what_the_study_decides():
    from lorapar_utils.report.claims import judgements, load_claims

    asked = load_claims()
    judged = dict(zip((claim["claim"] for claim in asked), judgements(study(), asked), strict=True))
    decided = {name: one.verdict for name, one in judged.items() if one.verdict in ("reproduced", "not reproduced")}
    assert decided == {name: verdict for name, (verdict, _) in SAID_IN_README.items()}
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert [words for _, words in SAID_IN_README.values() if words not in readme] == []
    behind = judged[BEHIND]
    assert behind.effect.high < 0.01 and behind.seeds == 6
    # "LoRA from PEFT's usual initialisation … is behind LoRA-PAR by less still"
    losses = [
        [study()[f"{arm}-seed{seed}"].metric("stage1/loss1").value for seed in range(6, 11)]
        for arm in ("lora_std_sft", "importance_0.9_later")
    ]
    ahead = intervals.over_seeds([lora - par for lora, par in zip(*losses, strict=True)])
    assert ahead.low > 0 and ahead.value < behind.effect.value and "in five blocks of its own" in readme


def test_arms_of_the_study_are_means_over_blocks_and_tuning_runs_are_none_of_them():
    def arm(seed, loss, **more):
        parameters = {"title": "LoRA", "measured_on": "test", "learning_rate": 0.002, "sweep": "regions"}
        parameters |= {
            "stages": ["sft"],
            "method": "lora",
            "r": 8,
            "kl": 0.04,
            "modules": "QKVGUD",
            "theta": 0.9,
        } | more
        metrics = {"stage1/loss1": Metric(loss, 400), "active/stage1": Metric(1.0, 8)}
        metrics |= {f"stage1/{key}": Metric(0.5, 400) for key in ("system1", "lenient1", "system2")}
        return record(f"lora-seed{seed}", seed=seed, parameters=parameters, **metrics)

    tuned = arm(100, 9.0, measured_on="validation_loss", sweep="tuning", title="LoRA, rate 0.002")
    table = tables.arms_table([arm(0, 0.1), arm(1, 0.2), tuned])
    assert table["arm"].tolist() == ["LoRA"] and table["seeds"].tolist() == [2]
    assert table["loss of System 1, nats, each seed"].tolist() == ["0.1000, 0.2000"]
    reach = scipy.stats.t.ppf(0.975, 1) * np.std([0.1, 0.2], ddof=1) / 2**0.5
    assert table["loss of System 1, nats"].tolist() == [f"0.1500 [{0.15 - reach:.4f}, {0.15 + reach:.4f}]"]
    assert tables.arms_table([tuned]).empty
    assert table["paper, GSM8K %"].tolist() == [30.63]
    par = arm(0, 0.1, method="lorapar", selection="importance")
    lower = arm(0, 0.1, r=3, title="LoRA, r = 3")
    assert tables.arms_table([par])["paper, GSM8K %"].tolist() == [27.3]
    assert tables.arms_table([lower])["paper, GSM8K %"].tolist() == ["–"]
    assert [r.name for r in figures.tuned_records({"a": tuned, "b": arm(0, 0.1)}, "sft")] == ["lora-seed100"]
    assert "no learning rate" in figures.tuning([]).axes[0].texts[0].get_text()


def test_the_forest_shows_every_claim_that_was_run_with_both_intervals():
    records = blocks_of(a=[30, 31, 32, 30, 31], b=[20, 22, 20, 21, 20])
    other = sides(first={"record": "c", "stage": "stage1"})
    drawn = figures.forest(records, [sides(), other])
    (axes,) = drawn.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["c\nreproduced, 5 blocks"]
    widths = sorted(line.get_linewidth() for line in axes.lines)
    assert {1.2, 4.0} <= set(widths)
    assert "none of these claims has been run" in figures.forest({}, [sides()]).axes[0].texts[0].get_text()


def test_questions_stand_beside_the_answers_of_each_stage():
    def item(stage, number, **more):
        return {"stage": stage, "id": f"q{number}", "system": 1 + number // 2, "task": f"t{number % 2}", **more}

    base = record("base-seed0", items=[item("base", n, completion="no", correct=False) for n in (0, 2, 3)])
    trained = [item("stage1", n, completion="8 + 0 = 8\n#### 8", correct=True) for n in range(4)]
    unasked = [item("stage1", 9, completion="x", correct=True), item("stage2", 0, loss=0.1)]
    frame = tables.answers_table(
        [base, record("a-seed0", items=trained + unasked)], {f"q{n}": f"Q{n}?" for n in range(5)}
    )
    assert frame["question"].tolist() == ["Q0?", "Q2?", "Q3?", "Q1?"]
    assert frame["base model"].tolist() == ["no\n(wrong)"] * 3 + ["–"] and "after stage 2" not in frame
    assert set(frame["after stage 1"]) == {"8\xa0+\xa00\xa0=\xa08\n####\xa08"}
    endless = record("a-seed0", items=[item("stage1", 0, completion="\n".join("12345678"), correct=True)])
    assert tables.answers_table([endless], {"q0": "Q0?"})["after stage 1"][0] == "1\n2\n3\n4\n5\n6\n…"
    of_loss_alone = record("a-seed0", items=[item("stage1", 0, loss=0.1)])
    assert tables.answers_table([of_loss_alone], {"q0": "Q0?"}).empty


def test_numbers_of_a_column_have_as_many_decimals_as_its_longest():
    frame = pd.DataFrame(
        {"share": [0.5, 0.495, None], "count": [1.0, 2.0, 30.0], "small": [1e-7, 1.0, None], "n": [1, 2, 3]}
    )
    shown = notebook.shown(frame).data
    assert shown["share"].tolist() == ["0.500", "0.495", "–"] and shown["count"].tolist() == ["1", "2", "30"]
    assert shown["small"].tolist() == ["1e-07", "1", "–"] and shown["n"].tolist() == [1, 2, 3]


def test_arms_after_both_stages_are_means_over_blocks_and_no_arms_of_stage_1():
    def arm(seed, system2, stages=("sft", "grpo")):
        parameters = {"title": "LoRA, r = 8", "measured_on": "test", "stages": list(stages), "grpo_learning_rate": 1e-4}
        metrics = {"stage2/system1": Metric(0.5, 400), "stage2/accuracy": Metric(system2 + 0.1, 800)}
        metrics |= {"stage2/system2": Metric(system2, 400), "gain/system2": Metric(system2 - 0.1, 400)}
        metrics |= {"gain/system1": Metric(-0.02, 400), "active/stage2": Metric(0.4, 2_000_000)}
        return record(f"lora_rl-seed{seed}", seed=seed, parameters=parameters, **metrics)

    blocks = [arm(0, 0.2), arm(1, 0.3)]
    (row,) = tables.reinforced_table([*blocks, arm(2, 0.9, ("sft",))]).to_dict("records")
    reach = 100 * scipy.stats.t.ppf(0.975, 1) * np.std([0.2, 0.3], ddof=1) / 2**0.5
    assert row["System 2, %"] == f"25.0 [{25 - reach:.1f}, {25 + reach:.1f}]" and row["seeds"] == 2
    assert row["both, %, each seed"] == "30.0, 40.0" and row["elements, rate of stage 2"] == "0.80 M, 0.0001"
    assert row["System 1, gain"].startswith("-2.0 [") and row["System 2, gain"].startswith("+15.0 [")
    assert row["paper, GSM8K %"] == "Qwen 69.83" and tables.arms_table(blocks).empty
    declared = {spec.title for spec in load_profile("study").experiments.values()}
    assert tables._after_both_stages().keys() <= declared


def test_tables_of_the_study_have_no_run_that_chose_settings_and_keep_ranks_apart(tmp_path):
    exports.save_all(study(), tmp_path)
    named = {name for path in tmp_path.glob("*.csv") for name in re.findall(r"study/([\w.-]+)", path.read_text())}
    assert named and not {name for name in named if name.startswith(("tune", "gate"))}
    stages = pd.read_csv(tmp_path / "stages.csv")["experiment"].tolist()
    assert {"LoRA, r = 8", "LoRA, r = 3"} <= set(stages)
    cells = pd.read_csv(tmp_path / "table2_alpha_beta.csv")
    assert cells[["alpha", "beta"]].to_numpy().tolist() == [[1, 0], [1, 1]] and cells["seeds"].nunique() == 1


def test_cells_of_other_thetas_and_orders_are_none_of_table_2_and_one_cell_is_no_table():
    cells = [cell(1.0, 1.0, 0, 20), cell(0.5, 1.0, 0, 20)]
    other = cell(1.0, 1.0, 1, 40)
    other.run["parameters"] |= {"theta": 0.8}
    reverse = cell(1.0, 1.0, 2, 40)
    reverse.run["parameters"] |= {"stages": ["grpo", "sft"]}
    assert tables.alpha_beta_table([*cells, other, reverse])["seeds"].tolist() == [1, 1]
    assert tables.alpha_beta_table(cells[:1]).empty and tables.order_table([cells[0]]).empty
    assert tables.order_table([cells[0], other, reverse])["schedule"].tolist() == ["SFT then RL", "RL then SFT"]


def test_a_readers_own_modules_and_ranks_have_rows_without_a_number_of_the_papers():
    def run(r, **more):
        one = trained("lora", 0, ["sft"], 20, modules="qkv_proj+down_proj", r=r, **more)
        one.metrics["active/stage1"] = Metric(1.0, 10)
        return one

    frame = tables.theta_table([run(8), run(4)])
    assert frame["selection"].tolist() == ["all elements", "all elements, r = 4"]
    assert frame["paper, accuracy %"].tolist() == ["–", "–"]
