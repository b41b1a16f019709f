"""The record of a vote: how the teachers split the pool, how far they agree, and how far they are right."""

import datasets
import krippendorff
import numpy as np
import pandas as pd
from scipy.stats import rankdata
from statsmodels.stats.inter_rater import fleiss_kappa

from lorapar_utils import voting
from lorapar_utils.records import Record, intervals, new_record
from lorapar_utils.records.intervals import Metric
from lorapar_utils.settings import Settings


def voting_record(voted: datasets.Dataset, settings: Settings, origin: dict | None = None) -> Record:
    """How the teachers split the pool, how far they agree, and how far they are right.

    Metrics: `undecided`, `system1_share`, `abstained/NAME`; agreement among the panel's teachers: `kappa` (Fleiss',
    over examples without an abstention) and `alpha` (Krippendorff's, abstentions left out); against the construction
    labels: `accuracy/NAME`, `accuracy/majority`, `auc/NAME` (teachers with a margin), `auc/margins` (the panel's summed
    margins). Tables: `panels` (the split that each panel makes), `by_steps`.
    Items: each example with its system, every teacher's vote and, of local teachers, margin.
    A metric that is undefined, as with one teacher or one system only, is absent.
    """
    frame = voted.to_pandas()
    truth = frame["construction"].to_numpy()
    names = [teacher.name for teacher in settings.voting.teachers]
    ballots = pd.DataFrame(np.stack(frame["votes"].to_numpy()), columns=names)
    members = list(settings.voting.members())
    metrics = {
        "undecided": intervals.proportion(frame["system"] == 0),
        "system1_share": intervals.proportion(frame["system"] == 1),
        **_agreement(ballots[members].to_numpy()),
    }
    for name in names:
        votes = ballots[name].to_numpy()
        metrics[f"abstained/{name}"] = intervals.proportion(votes == 0)
        metrics |= _against(f"accuracy/{name}", votes, truth)
        margins = frame.get(f"margin_{name}")
        if margins is not None and {1, 2} <= set(truth):
            metrics[f"auc/{name}"] = _separation(margins.to_numpy(), truth)
    metrics |= _against("accuracy/majority", frame["system"].to_numpy(), truth)
    if {1, 2} <= set(truth) and (summed := _summed_margins(frame, members)) is not None:
        metrics["auc/margins"] = _separation(summed, truth)
    tables = {
        "panels": _panels(ballots, frame["system"].to_numpy(), truth, settings),
        "by_steps": _by_steps(frame, ballots),
    }
    return new_record(
        "voting",
        settings,
        metrics=metrics,
        tables=tables,
        items=_items(frame, names),
        notebook="01_voting.ipynb out.ipynb",
        origin=origin,
    )


def _items(frame: pd.DataFrame, names: list[str]) -> list[dict]:
    """One row per example: question, what it was made with, its system, and what each teacher said."""
    rows = []
    for row in frame.to_dict("records"):
        margins = {name: row.get(f"margin_{name}") for name in names}
        rows.append(
            {key: row[key] for key in ("id", "prompt", "answer", "steps", "system")}
            | {"votes": dict(zip(names, map(int, row["votes"]), strict=True))}
            | {"margins": {name: round(margin, 4) for name, margin in margins.items() if margin is not None}}
        )
    return rows


def _agreement(votes: np.ndarray) -> dict[str, Metric]:
    """Fleiss' kappa and Krippendorff's alpha of `votes` (examples x teachers), where they are defined."""
    counts = np.stack([(votes == 1).sum(1), (votes == 2).sum(1)], axis=1)
    complete = counts[counts.sum(1) == votes.shape[1]]
    paired = counts[counts.sum(1) >= 2]
    metrics = {}
    if votes.shape[1] > 1 and (complete.sum(0) > 0).all():
        metrics["kappa"] = intervals.resampled(lambda i: fleiss_kappa(complete[i]), len(complete))
    if (paired.sum(0) > 0).all():
        metrics["alpha"] = intervals.resampled(lambda i: _alpha(paired[i]), len(paired))
    return metrics


def _alpha(counts: np.ndarray) -> float:
    if not (counts.sum(0) > 0).all():
        return float("nan")  # undefined, because only one system got votes
    return krippendorff.alpha(value_counts=counts, level_of_measurement="nominal")


def _separation(margins: np.ndarray, truth: np.ndarray) -> Metric:
    margins, truth = margins[truth > 0], truth[truth > 0]
    return intervals.resampled(lambda i: _auc(margins[i], truth[i]), len(truth))


def _against(key: str, votes: np.ndarray, truth: np.ndarray) -> dict[str, Metric]:
    decided = (truth > 0) & (votes > 0)
    return {key: intervals.proportion(votes[decided] == truth[decided])} if decided.any() else {}


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
                share = intervals.proportion(cast == 2)
                rows.append({"steps": int(steps), "teacher": name, "system2_share": share.value, **_bounds(share)})
    return rows


def _summed_margins(frame: pd.DataFrame, members: list[str]) -> np.ndarray | None:
    """The sum of the members' margins, each divided by its standard deviation; None without margins."""
    columns = [f"margin_{name}" for name in members if f"margin_{name}" in frame]
    if not columns:
        return None
    margins = frame[columns].to_numpy()
    return (margins / margins.std(0).clip(min=1e-12)).sum(1)


def _bounds(metric: Metric) -> dict:
    return {"low": metric.low, "high": metric.high, "n": metric.n}


def _auc(margins: np.ndarray, truth: np.ndarray) -> float:
    """The chance that a System 2 example has the larger margin than a System 1 one."""
    ranks, twos = rankdata(margins), truth == 2
    n2, n1 = int(twos.sum()), int((~twos).sum())
    if not n1 or not n2:
        return float("nan")
    return float((ranks[twos].sum() - n2 * (n2 + 1) / 2) / (n1 * n2))
