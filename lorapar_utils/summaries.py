"""Votes and importance scores as records, for figures, tables and claims."""

import itertools
from collections.abc import Sequence

import datasets
import krippendorff
import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from statsmodels.stats.inter_rater import fleiss_kappa

from lorapar_utils import statistics, voting
from lorapar_utils.data import construction_system
from lorapar_utils.partition import Partition, build_partition
from lorapar_utils.records import Record, new_record
from lorapar_utils.settings import Settings
from lorapar_utils.statistics import Metric

SCATTER_POINTS = 1500


def voting_record(voted: datasets.Dataset, settings: Settings) -> Record:
    """How the teachers split the pool, how far they agree, and how far they are right.

    Metrics: `undecided`, `system1_share`, `abstained/NAME`; agreement among the panel's teachers: `kappa` (Fleiss',
    over examples without an abstention) and `alpha` (Krippendorff's, abstentions left out); against the construction
    labels: `accuracy/NAME`, `accuracy/majority`, `auc/NAME` (teachers with a margin), `auc/margins` (the panel's summed
    margins). Tables: `panels` (the split that each panel makes), `by_steps`, `confusion`, `reliability` (calibration of
    the margins), `certain` (accuracy where the summed margins are largest), `disputed`.
    A metric that is undefined, as with one teacher or one system only, is absent.
    """
    frame = voted.to_pandas()
    truth = frame["steps"].map(construction_system).to_numpy()
    names = [teacher.name for teacher in settings.voting.teachers]
    ballots = pd.DataFrame(np.stack(frame["votes"].to_numpy()), columns=names)
    members = list(settings.voting.members())
    metrics = {
        "undecided": statistics.proportion(frame["system"] == 0),
        "system1_share": statistics.proportion(frame["system"] == 1),
        **_agreement(ballots[members].to_numpy()),
    }
    for name in names:
        votes = ballots[name].to_numpy()
        metrics[f"abstained/{name}"] = statistics.proportion(votes == 0)
        metrics |= _against(f"accuracy/{name}", votes, truth)
        margins = frame.get(f"margin_{name}")
        if margins is not None and {1, 2} <= set(truth):
            metrics[f"auc/{name}"] = _separation(margins.to_numpy(), truth)
    metrics |= _against("accuracy/majority", frame["system"].to_numpy(), truth)
    summed = _summed_margins(frame, members) if {1, 2} <= set(truth) else None
    if summed is not None:
        metrics["auc/margins"] = _separation(summed, truth)
    tables = {
        "panels": _panels(ballots, frame["system"].to_numpy(), truth, settings),
        "by_steps": _by_steps(frame, ballots),
        "confusion": _confusion(frame["system"].to_numpy(), ballots, truth),
        "reliability": _reliability(frame, names, truth),
        "certain": [] if summed is None else _certain(summed, truth),
        "disputed": _disputed(frame, members),
    }
    return new_record("voting", settings, metrics=metrics, tables=tables, notebook="01_voting.ipynb out.ipynb")


def _agreement(votes: np.ndarray) -> dict[str, Metric]:
    """Fleiss' kappa and Krippendorff's alpha of `votes` (examples x teachers), where they are defined."""
    counts = np.stack([(votes == 1).sum(1), (votes == 2).sum(1)], axis=1)
    complete = counts[counts.sum(1) == votes.shape[1]]
    paired = counts[counts.sum(1) >= 2]
    metrics = {}
    if votes.shape[1] > 1 and (complete.sum(0) > 0).all():
        metrics["kappa"] = statistics.resampled(lambda i: fleiss_kappa(complete[i]), len(complete))
    if (paired.sum(0) > 0).all():
        metrics["alpha"] = statistics.resampled(lambda i: _alpha(paired[i]), len(paired))
    return metrics


def _alpha(counts: np.ndarray) -> float:
    if not (counts.sum(0) > 0).all():
        return float("nan")  # undefined, because only one system got votes
    return krippendorff.alpha(value_counts=counts, level_of_measurement="nominal")


def _separation(margins: np.ndarray, truth: np.ndarray) -> Metric:
    margins, truth = margins[truth > 0], truth[truth > 0]
    return statistics.resampled(lambda i: _auc(margins[i], truth[i]), len(truth))


def _against(key: str, votes: np.ndarray, truth: np.ndarray) -> dict[str, Metric]:
    decided = (truth > 0) & (votes > 0)
    return {key: statistics.proportion(votes[decided] == truth[decided])} if decided.any() else {}


def _panels(ballots: pd.DataFrame, system: np.ndarray, truth: np.ndarray, settings: Settings) -> list[dict]:
    """One row per panel: the split, the accuracy against construction, and the share of examples that change system."""
    voting_settings, rows = settings.voting, []
    for panel in voting_settings.panels or [None]:
        members = list(voting_settings.members(panel))
        decided, _ = voting.decide(ballots[members].to_numpy(), quorum=voting_settings.quorum, tie=voting_settings.tie)
        role_play = {t.name: t.role_play for t in voting_settings.teachers if t.kind != "recorded"}
        accuracy = _against("accuracy", decided, truth).get("accuracy")
        rows.append(
            {
                "panel": panel or "all",
                "n": len(members),
                "role_play": "yes" if all(role_play.get(m, True) for m in members) else "no",
                "system1_share": float((decided == 1).mean()),
                "undecided": float((decided == 0).mean()),
                "accuracy": accuracy and accuracy.as_json(),
                "moved": float((decided != system).mean()),
            }
        )
    return rows


def _by_steps(frame: pd.DataFrame, ballots: pd.DataFrame) -> list[dict]:
    rows = []
    for steps, index in frame.groupby("steps").groups.items():
        for name, votes in [("majority", frame["system"]), *ballots.items()]:
            cast = votes[index][votes[index] > 0]
            if len(cast):
                share = statistics.proportion(cast == 2)
                rows.append({"steps": int(steps), "teacher": name, "system2_share": share.value, **_bounds(share)})
    return rows


def _confusion(system: np.ndarray, ballots: pd.DataFrame, truth: np.ndarray) -> list[dict]:
    return [
        {
            "teacher": name,
            "construction": int(row),
            "votes": column,
            "examples": int(((truth == row) & (v == column)).sum()),
        }
        for name, v in [("majority", system), *((name, ballots[name].to_numpy()) for name in ballots)]
        for row, column in itertools.product(sorted(set(truth)), (0, 1, 2))
    ]


def _reliability(frame: pd.DataFrame, names: list[str], truth: np.ndarray, bins: int = 8) -> list[dict]:
    """Bins of equal count by a teacher's P(System 2): the mean P(System 2), and the share that is System 2."""
    rows = []
    for name in names:
        if f"margin_{name}" not in frame or not (truth > 0).all():
            continue
        p = 1 / (1 + np.exp(-frame[f"margin_{name}"]))
        for _, examples in p.groupby(pd.qcut(p, bins, duplicates="drop"), observed=True).groups.items():
            share = statistics.proportion(truth[examples] == 2)
            rows.append({"teacher": name, "said": float(p[examples].mean()), "share": share.value, **_bounds(share)})
    return rows


def _summed_margins(frame: pd.DataFrame, members: list[str]) -> np.ndarray | None:
    """The sum of the members' margins, each divided by its standard deviation; None without margins."""
    columns = [f"margin_{name}" for name in members if f"margin_{name}" in frame]
    if not columns:
        return None
    margins = frame[columns].to_numpy()
    return (margins / margins.std(0).clip(min=1e-12)).sum(1)


def _certain(margins: np.ndarray, truth: np.ndarray) -> list[dict]:
    """Accuracy of the margins' sign among the examples with the largest absolute margins."""
    order = np.argsort(-np.abs(margins), kind="stable")
    rows = []
    for kept in (0.1, 0.25, 0.5, 0.75, 1.0):
        examples = order[: max(1, round(kept * len(order)))]
        accuracy = _against("accuracy", np.where(margins[examples] > 0, 2, 1), truth[examples]).get("accuracy")
        share = float((margins[examples] <= 0).mean())
        rows.append({"kept": kept, "system1_share": share, "accuracy": accuracy and accuracy.as_json()})
    return rows


def _disputed(frame: pd.DataFrame, members: list[str]) -> list[dict]:
    """The examples with the least agreement; first one of each task and number of steps, then the second of each."""
    split = frame.sort_values("agreement", kind="stable")
    split = split.assign(turn=split.groupby(["task", "steps"]).cumcount()).sort_values(
        ["turn", "agreement"], kind="stable"
    )
    return [
        {"prompt": row.prompt, "answer": row.answer, "steps": int(row.steps), "votes": " ".join(map(str, row.votes))}
        for row in split[split["agreement"] < 1].head(8).itertuples()
    ]


def _bounds(metric: Metric) -> dict:
    return {"low": metric.low, "high": metric.high, "n": metric.n}


def importance_record(scores: Sequence[dict[str, torch.Tensor]], partition: Partition, settings: Settings) -> Record:
    """The layer x module map, the regions, concentration curves and a sample of the paper's scatter.

    Metrics: `active/…`, `selected/…`, `region/…`, `jaccard`, `jaccard_chance` (expected of two random sets of these
    sizes). Tables: `map` (mean score by layer, module and matrix, scaled to mean 1 per system, and region shares),
    `by_rank` (the same by rank), `concentration`, `scatter`, `explorer` (counts of elements by theta, layer and
    module, as one list per column).
    """
    flat = [torch.cat([values.flatten() for values in one.values()]).double() for one in scores]
    total = flat[0].numel()
    share1, share2 = (float(mask.double().mean()) for mask in partition.selected)
    expected = share1 * share2 / (share1 + share2 - share1 * share2)
    metrics = {f"active/{key}": Metric(share, total) for key, share in partition.active_share.items()}
    metrics |= {f"region/{key}": Metric(float(m.double().mean()), total) for key, m in partition.regions().items()}
    metrics |= {
        "jaccard": Metric(partition.jaccard, total),
        "jaccard_chance": Metric(expected, total),
        "selected/system1": Metric(share1, total),
        "selected/system2": Metric(share2, total),
    }
    table = partition.summary()
    for system, (one, everything) in enumerate(zip(scores, flat, strict=True), start=1):
        table[f"system{system}"] = [float(v.double().mean() / everything.mean()) for v in one.values()]
    tables = {
        "map": table.round(6).to_dict("records"),
        "by_rank": _by_rank(scores, flat, partition),
        "concentration": _concentration(flat),
        "scatter": _scatter(flat, partition),
        "explorer": _explorer(scores),
    }
    return new_record("importance", settings, metrics=metrics, tables=tables, notebook="02_importance.ipynb out.ipynb")


def stability_record(rows: Sequence[dict], settings: Settings) -> Record:
    """How far importance depends on the examples and on the adapter's initial weights; `rows` from `phases.stability`.

    Metrics are means over the draws at the most examples: `examples/rank_correlation/system1`, `adapter/…`.
    """
    frame = pd.DataFrame(rows)
    metrics = {}
    for (differ, system), points in frame.groupby(["differ", "system"]):
        most = points[points["n"] == points["n"].max()]
        for key in ("rank_correlation", "by_matrix", "jaccard"):
            metrics[f"{differ}/{key}/system{system}"] = Metric(float(most[key].mean()), len(most))
    tables = {"stability": list(rows)}
    return new_record("stability", settings, metrics=metrics, tables=tables, notebook="02_importance.ipynb out.ipynb")


def _by_rank(scores: Sequence[dict[str, torch.Tensor]], flat: list[torch.Tensor], partition: Partition) -> list[dict]:
    """`Partition.by_rank`, and the mean score of each rank, scaled to mean 1 per system."""
    table = partition.by_rank()
    for system, (one, everything) in enumerate(zip(scores, flat, strict=True), start=1):
        means: dict[str, list[torch.Tensor]] = {"A": [], "B": []}
        for name, values in one.items():
            matrix = "A" if ".lora_A." in name else "B"
            # A is rank x in, B is out x rank.
            means[matrix].append(values.double().mean(1 if matrix == "A" else 0))
        averages = {matrix: torch.stack(ranks).mean(0) / everything.mean() for matrix, ranks in means.items()}
        table[f"system{system}"] = [float(averages[row.matrix][row.rank]) for row in table.itertuples()]
    return table.round(6).to_dict("records")


# The values of theta, and of alpha and beta, that the theta explorer offers.
EXPLORED_THETA = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
EXPLORED_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def _explorer(scores: Sequence[dict[str, torch.Tensor]]) -> dict[str, list]:
    """Elements of each layer and module: in each region by theta, and active in each stage by alpha or beta.

    Columns `stage1_0` … `stage1_4` count stage 1 at the alphas `EXPLORED_SHARES`; `stage2_0` … likewise for beta.
    """
    frames = []
    for theta in EXPLORED_THETA:
        counts = []
        for i, share in enumerate(EXPLORED_SHARES):
            table = build_partition(*scores, theta=theta, alpha=share, beta=share).summary()
            columns = {f"stage{k}": f"stage{k}_{i}" for k in (1, 2)}
            if i == 0:
                columns |= {region: region for region in ("system1_only", "system2_only", "shared")}
            counts.append(table[list(columns)].mul(table["elements"], axis=0).rename(columns=columns))
        table = pd.concat([table[["layer", "module", "elements"]], *counts], axis=1)
        summed = table.groupby(["layer", "module"], sort=False).sum().round().astype(int).reset_index()
        frames.append(summed.assign(theta=theta))
    return pd.concat(frames).to_dict("list")


def _concentration(flat: list[torch.Tensor]) -> list[dict]:
    rows = []
    for system, values in enumerate(flat, start=1):
        cumulative = values.sort(descending=True).values.cumsum(0)
        for share in (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0):
            index = max(0, round(share * values.numel()) - 1)
            rows.append({"system": system, "elements": share, "importance": float(cumulative[index] / cumulative[-1])})
    return rows


def _scatter(flat: list[torch.Tensor], partition: Partition) -> list[dict]:
    sample = torch.randperm(flat[0].numel(), generator=torch.Generator().manual_seed(0))[:SCATTER_POINTS]
    normalised = [values / values.norm() for values in flat]
    regions = partition.regions()
    names = list(regions)
    which = torch.stack([regions[name][sample] for name in names]).int().argmax(0)
    return [
        {"system1": float(f"{normalised[0][i]:.3g}"), "system2": float(f"{normalised[1][i]:.3g}"), "region": names[w]}
        for i, w in zip(sample.tolist(), which.tolist(), strict=True)
    ]


def _auc(margins: np.ndarray, truth: np.ndarray) -> float:
    """The chance that a System 2 example has the larger margin than a System 1 one."""
    ranks, twos = rankdata(margins), truth == 2
    n2, n1 = int(twos.sum()), int((~twos).sum())
    if not n1 or not n2:
        return float("nan")
    return float((ranks[twos].sum() - n2 * (n2 + 1) / 2) / (n1 * n2))
