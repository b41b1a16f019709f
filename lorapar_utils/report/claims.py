"""The paper's claims, judged from records by criteria that were fixed before the run."""

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import yaml

from lorapar_utils.errors import InputError
from lorapar_utils.records import Record, cite, common_seeds, intervals, mean_outcomes
from lorapar_utils.settings import project_root

# Kind of test -> the sides that it compares, with their weights in the effect.
SIDES = {
    "greater": {"first": 1, "second": -1},
    "concave": {"low": -1, "middle": 2, "high": -1},
}


def load_claims(path: Path | None = None) -> list[dict]:
    """The claims of `book/claims.yaml`, in order; the file's header describes the fields."""
    return yaml.safe_load((path or project_root() / "book" / "claims.yaml").read_text(encoding="utf-8"))


def scoreboard(
    records: dict[str, Record],
    claims: list[dict] | None = None,
    link: Callable[[Record], str] | None = None,
    own: dict[str, Record] | None = None,
) -> pd.DataFrame:
    """One row per claim: verdict, effect with interval, n, and the records as evidence.

    Parameters
    ----------
    records
        By name, as `records.evidence` gives them. The verdict rests on these alone.
    own
        Records of a reader's run, by name: its effect stands beside, where it has what the claim compares.
    claims
        Claims from `load_claims`; None judges all.
    link
        Gives a record's address; column `evidence` is then HTML with a link to each record.
    """
    rows = []
    for claim in load_claims() if claims is None else claims:
        verdict, effect, n = judge(claim, records)
        sides = [side["record"] for side in claim["test"].values() if isinstance(side, dict)]
        evidence = {name: _named(records, name) for name in dict.fromkeys(sides)}
        rows.append(
            {
                "claim": claim["claim"],
                "paper": claim["paper"],
                "verdict": verdict,
                "effect": effect,
                **({"this run": _effect(claim, own)} if own else {}),
                "n": "–" if n is None else f"{n:,}",
                "evidence": "; ".join(cite(name, runs, link) for name, runs in evidence.items()) or "–",
            }
        )
    return pd.DataFrame(rows)


def _effect(claim: dict, records: dict[str, Record]) -> str:
    verdict, effect, _ = judge(claim, records)
    return "–" if verdict == "not run" else effect


def judge(claim: dict, records: dict[str, Record]) -> tuple[str, str, int | None]:
    """Verdict, effect in words and n of one claim.

    `greater` and `concave` are judged over test items, whose outcomes are means over the seeds that all sides have. The
    claim is reproduced if the 95 % interval of `first - second`, or of `2 middle - low - high`, is above `margin`, and
    not reproduced if below. `within` is reproduced if the metric is in [low, high].
    """
    test = claim["test"]
    if test["kind"] == "none":
        return "not run", test["why"], None
    if test["kind"] not in ("within", *SIDES):
        raise InputError(
            f"claims.yaml: claim {claim['claim']!r}: test.kind = {test['kind']!r}; "
            f"use within, {', '.join(SIDES)} or none"
        )
    if test["kind"] == "within":
        runs = _named(records, test["first"]["record"])
        if not runs:
            return "not run", "no record", None
        metric = runs[0].metric(test["first"]["metric"])
        inside = test["low"] <= metric.value <= test["high"]
        return "reproduced" if inside else "not reproduced", f"{metric.value:.3f}", metric.n
    weights = SIDES[test["kind"]].values()
    sides = [test[key] for key in SIDES[test["kind"]]]
    runs = [_named(records, side["record"]) for side in sides]
    if not all(runs):
        return "not run", "no record", None
    paired = common_seeds(runs)
    outcomes = [mean_outcomes(p, s["stage"], s.get("system")) for p, s in zip(paired, sides, strict=True)]
    common = sorted(set.intersection(*map(set, outcomes)))
    if not common:
        return "not run", "no seed or no item in common", None
    gap = intervals.mean([sum(w * side[i] for w, side in zip(weights, outcomes, strict=True)) for i in common])
    seeds = len({record.run["seed"] for record in paired[0]})
    effect = f"{gap.points()}, {seeds} seed{'s' if seeds > 1 else ''}"
    if gap.n < claim["min_n"] or gap.low <= test["margin"] <= gap.high:
        return "inconclusive", effect, gap.n
    return "reproduced" if gap.low > test["margin"] else "not reproduced", effect, gap.n


def _named(records: dict[str, Record], name: str) -> list[Record]:
    """The record `name`, or the records of experiment `name` at every seed."""
    return [record for key, record in records.items() if re.fullmatch(rf"{re.escape(name)}(-seed\d+)?", key)]
