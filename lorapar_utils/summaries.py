"""Votes and scores condensed into records: what figures, tables and claims are drawn from."""

import itertools
from collections.abc import Sequence

import datasets
import numpy as np
import pandas as pd
import torch
from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa

from lorapar_utils import statistics
from lorapar_utils.data import construction_system
from lorapar_utils.partition import Partition
from lorapar_utils.records import Record, new_record
from lorapar_utils.settings import Settings

SCATTER_POINTS = 1500


def voting_record(voted: datasets.Dataset, settings: Settings) -> Record:
    """Shares, agreement among teachers, and each teacher against the construction labels.

    Metrics: `undecided`, `system1_share`, `kappa` (Fleiss; NaN left out), `accuracy/NAME` and `auc/NAME` per teacher
    and for the majority. Tables: `confusion`, `by_steps`, `disputed`.
    """
    frame = voted.to_pandas()
    truth = frame["steps"].map(construction_system)
    names = [teacher.name for teacher in settings.voting.teachers]
    ballots = np.stack(frame["votes"].to_numpy())
    metrics = {
        "undecided": statistics.proportion(frame["system"] == 0),
        "system1_share": statistics.proportion(frame["system"] == 1),
    }
    if len(names) > 1:
        kappa = fleiss_kappa(aggregate_raters(ballots, n_cat=None)[0])
        if np.isfinite(kappa):
            metrics["kappa"] = {"value": float(kappa), "n": len(frame)}
    known = truth > 0
    if known.any():
        for i, name in enumerate(names):
            metrics[f"accuracy/{name}"] = statistics.proportion(ballots[known, i] == truth[known])
            metrics[f"auc/{name}"] = {
                "value": _auc(frame[f"margin_{name}"][known], truth[known]),
                "n": int(known.sum()),
            }
        decided = known & (frame["system"] > 0)
        if decided.any():
            metrics["accuracy/majority"] = statistics.proportion(frame["system"][decided] == truth[decided])
    by_steps = [
        {"steps": int(steps), "system2_share": float((rows["system"] == 2).mean()), "n": len(rows)}
        for steps, rows in frame.groupby("steps")
    ]
    confusion = [
        {
            "construction": int(row),
            "votes": int(column),
            "examples": int(((truth == row) & (frame["system"] == column)).sum()),
        }
        for row, column in itertools.product(sorted(truth.unique()), (0, 1, 2))
    ]
    split = frame.sort_values("agreement").head(6)
    disputed = [
        {"prompt": row.prompt, "answer": row.answer, "votes": " ".join(map(str, row.votes)), "steps": int(row.steps)}
        for row in split.itertuples()
    ]
    tables = {"by_steps": by_steps, "confusion": confusion, "disputed": disputed}
    return new_record("voting", settings, metrics=metrics, tables=tables, notebook="01_voting.ipynb out.ipynb")


def importance_record(scores: Sequence[dict[str, torch.Tensor]], partition: Partition, settings: Settings) -> Record:
    """The layer x module map, the regions, concentration curves and a sample of the paper's scatter.

    Metrics: `active/…`, `jaccard`, `jaccard_chance` (expected of two random sets of these sizes),
    `region/…`. Tables: `map` (mean score of layer, module and matrix, scaled to mean 1 a system, and region
    shares), `concentration`, `scatter`.
    """
    flat = [torch.cat([values.flatten() for values in one.values()]).double() for one in scores]
    total = flat[0].numel()
    share1, share2 = (float(mask.double().mean()) for mask in (partition.selected1, partition.selected2))
    expected = share1 * share2 / (share1 + share2 - share1 * share2)
    metrics = {f"active/{key}": {"value": v, "n": total} for key, v in partition.active_share.items()}
    metrics |= {
        f"region/{key}": {"value": float(m.double().mean()), "n": total} for key, m in partition.regions().items()
    }
    metrics |= {
        "jaccard": {"value": partition.jaccard, "n": total},
        "jaccard_chance": {"value": expected, "n": total},
        "selected/system1": {"value": share1, "n": total},
        "selected/system2": {"value": share2, "n": total},
    }
    table = partition.summary()
    for system, (one, everything) in enumerate(zip(scores, flat, strict=True), start=1):
        table[f"system{system}"] = [float(v.double().mean() / everything.mean()) for v in one.values()]
    tables = {
        "map": table.round(6).to_dict("records"),
        "concentration": _concentration(flat),
        "scatter": _scatter(flat, partition),
    }
    return new_record("importance", settings, metrics=metrics, tables=tables, notebook="02_importance.ipynb out.ipynb")


def _concentration(flat: list[torch.Tensor]) -> list[dict]:
    rows = []
    for system, values in enumerate(flat, start=1):
        reached = values.sort(descending=True).values.cumsum(0)
        for share in (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0):
            index = max(0, round(share * values.numel()) - 1)
            rows.append({"system": system, "elements": share, "importance": float(reached[index] / reached[-1])})
    return rows


def _scatter(flat: list[torch.Tensor], partition: Partition) -> list[dict]:
    chosen = torch.randperm(flat[0].numel(), generator=torch.Generator().manual_seed(0))[:SCATTER_POINTS]
    normalised = [values / values.norm() for values in flat]
    regions = partition.regions()
    names = list(regions)
    which = torch.stack([regions[name][chosen] for name in names]).int().argmax(0)
    return [
        {"system1": float(f"{normalised[0][i]:.3g}"), "system2": float(f"{normalised[1][i]:.3g}"), "region": names[w]}
        for i, w in zip(chosen.tolist(), which.tolist(), strict=True)
    ]


def _auc(margins: pd.Series, truth: pd.Series) -> float:
    """The chance that a System 2 example has the larger margin than a System 1 one."""
    ranks = margins.rank()
    twos = truth == 2
    n2, n1 = int(twos.sum()), int((~twos).sum())
    if not n1 or not n2:
        return float("nan")
    return float((ranks[twos].sum() - n2 * (n2 + 1) / 2) / (n1 * n2))
