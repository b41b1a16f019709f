"""Votes and scores condensed into records."""

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from lorapar_utils import data
from lorapar_utils.partition import build_partition
from lorapar_utils.pipeline import scores
from lorapar_utils.records import from_scores, from_votes, new_record, null_model
from lorapar_utils.report import figures, tables
from lorapar_utils.settings import load_profile


def voted(margins, steps):
    """A pool on which the smoke profile's three local teachers have these margins (examples x teachers)."""
    names = [teacher.name for teacher in load_profile("smoke").voting.teachers]
    votes = np.where(np.array(margins) > 0, 2, 1)
    rows = []
    for i, (its, cast, depth) in enumerate(zip(margins, votes, steps, strict=True)):
        row = {
            "id": str(i),
            "prompt": f"p{i}",
            "answer": "1",
            "task": "sum",
            "steps": depth,
            "construction": data.construction_system(depth),
            "votes": cast.tolist(),
        }
        row |= {f"margin_{name}": float(margin) for name, margin in zip(names, its, strict=True)}
        twos = int((cast == 2).sum())
        rows.append(row | {"system": 2 if twos > 1 else 1, "agreement": max(twos, 3 - twos) / 3})
    return datasets.Dataset.from_list(rows)


def test_voting_record_counts_who_is_right_and_how_margins_order():
    # Sure and right on the first 20, unsure and wrong on the last 20.
    margins = [[3.0, 2.0, 2.5]] * 10 + [[-3.0, -2.0, -2.5]] * 10 + [[0.1, 0.2, -0.1]] * 10 + [[-0.1, -0.2, 0.1]] * 10
    steps = [4] * 10 + [0] * 10 + [0] * 10 + [4] * 10
    record = from_votes.voting_record(voted(margins, steps), load_profile("smoke"))
    assert record.metric("accuracy/majority").value == 0.5 and record.metric("system1_share").value == 0.5
    # 20 x 20 pairs of a System 2 and a System 1 example: the sure ones are in order, the unsure among themselves are not.
    assert record.metric("auc/margins").value == pytest.approx(0.75)


def test_votes_without_margins_have_no_auc():
    """As those of servers and files: the notebook's table then has a dash."""
    pool = voted([[1.0, 1.0, 1.0], [-1.0, -1.0, 1.0]] * 4, [4, 0] * 4)
    bare = pool.remove_columns([name for name in pool.column_names if name.startswith("margin_")])
    record = from_votes.voting_record(bare, load_profile("smoke"))
    assert "auc/margins" not in record.result["metrics"]
    assert tables.teacher_table(record)["AUC"].eq("–").all()


def test_importance_record_gives_the_overlap_that_chance_would():
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.{}.self_attn.{}.lora_{}.default.weight"
    shapes = {name.format(layer, "q_proj", m): (4, 8) if m == "A" else (8, 4) for layer in (0, 1) for m in "AB"}
    scores = [{n: torch.rand(shape, generator=generator) for n, shape in shapes.items()} for _ in (1, 2)]
    partition = build_partition(*scores, theta=0.5)
    record = from_scores.importance_record(scores, partition, load_profile("smoke"))
    p, q = (record.metric(f"selected/system{k}").value for k in (1, 2))
    assert record.metric("jaccard_chance").value == pytest.approx(p * q / (p + q - p * q))
    assert sum(record.metric(f"region/{region}").value for region in partition.regions()) == pytest.approx(1)
    means = pd.DataFrame(record.result["tables"]["map"])[["system1", "system2"]].mean()
    assert means.tolist() == pytest.approx([1, 1], abs=1e-5)


def test_stability_compares_disjoint_examples_and_different_adapters(project, monkeypatch):
    """With scores that are made of the example ids and the seed, every comparison can be told apart."""
    settings = load_profile("smoke", importance={"stability": [2, 5, 9]})
    systems = {system: [{"id": 100 * system + i} for i in range(11)] for system in (1, 2)}
    monkeypatch.setattr(scores, "_inputs", lambda *_: {})
    monkeypatch.setattr(scores, "_fresh_adapter", lambda _: "the one adapter")
    asked = []

    def scored(settings, samples, model=None):
        asked.append((settings.seed, model, [[row["id"] for row in rows] for rows in samples]))
        return [{"a": torch.arange(1.0, 9.0).roll(sum(rows) + settings.seed).view(2, 4)} for rows in asked[-1][2]]

    monkeypatch.setattr(scores, "_score", scored)
    rows = scores.stability(settings, systems)
    same = [(samples, model) for _, model, samples in asked if model]
    assert len(same) == 12 and all(not set(first) & set(second) for (first, second), _ in same)
    # Two samples of 9 do not fit into 11 examples; two adapters score the same sample of them.
    assert {row["n"] for row in rows if row["differ"] == "examples"} == {2, 5}
    others = [(seed, samples) for seed, model, samples in asked if not model]
    assert [seed for seed, _ in others] == [0, 1, 2] and all(samples == others[0][1] for _, samples in others)
    assert len([row for row in rows if row["differ"] == "adapter"]) == 6 and len(others[0][1][0]) == 9
    before = len(asked)
    assert scores.stability(settings, systems) == rows and len(asked) == before
    record = from_scores.stability_record(rows, settings)
    assert record.metric("adapter/jaccard/system1").n == 3
    assert len(figures.stability(pd.DataFrame(rows)).axes) == 3


def test_no_size_asks_for_no_stability(project, monkeypatch):
    monkeypatch.setattr(scores, "_inputs", lambda *_: {})
    assert scores.stability(load_profile("smoke", importance={"stability": []}), {}) == []


def test_a_model_without_two_systems_selects_about_half_with_half_in_common():
    """Matrices of one size and mean. Where means differ, fewer elements hold theta of the sum."""
    matrices = [{"elements": 5000, "system1": 1.0, "system2": 1.0} for _ in range(40)]
    record = new_record("importance", load_profile("smoke"), metrics={}, tables={"map": matrices})
    rows = null_model.without_systems(record, thetas=[0.5, 0.9])
    at = rows[rows["theta"] == 0.9].set_index("gradients")
    assert at["active"].between(0.44, 0.55).all() and at["jaccard"].between(0.42, 0.53).all()
    assert (rows[rows["theta"] == 0.5]["active"] < 0.2).all()
    assert rows.equals(null_model.without_systems(record, thetas=[0.5, 0.9]))
    unequal = [row | {"system1": 10.0 ** (i % 3), "system2": 10.0 ** (i % 3)} for i, row in enumerate(matrices)]
    uneven = new_record("importance", load_profile("smoke"), metrics={}, tables={"map": unequal})
    assert (null_model.without_systems(uneven, thetas=[0.9])["active"].to_numpy() < at["active"].to_numpy() - 0.1).all()
    # Where one system's scores lie in other matrices, the sets part.
    apart = [row | {f"system{1 + i % 2}": 0.01} for i, row in enumerate(matrices)]
    parted = new_record("importance", load_profile("smoke"), metrics={}, tables={"map": apart})
    assert (null_model.without_systems(parted, thetas=[0.9])["jaccard"] < 0.05).all()
