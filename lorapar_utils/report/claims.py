"""The paper's claims, judged over blocks by what `book/protocol.md` laid down before the runs."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from statsmodels.stats.multitest import multipletests

from lorapar_utils.errors import InputError
from lorapar_utils.records import Record, blocks, cite, intervals, null_model
from lorapar_utils.records.intervals import Metric
from lorapar_utils.settings import project_root

MIN_SEEDS = 5
LEVEL = 0.05
# Nats: where an interval lies within so much of 0, the protocol concludes that the choice does not matter.
EQUAL_WITHIN = 0.01
# Kind of test -> the sides that it compares, with their weights in the effect.
SIDES = {
    "greater": {"first": 1, "second": -1},
    "concave": {"low": -1, "middle": 2, "high": -1},
}
# Endpoint -> the field of an item, and its unit. With 1 or 2 after it, over that system's items alone.
ENDPOINTS = {"accuracy": "correct", "system": "correct", "lenient": "lenient", "loss": "loss"}


@dataclass(frozen=True)
class Judgement:
    """What the records say of a claim.

    Attributes
    ----------
    verdict
        `reproduced`, `not reproduced`, `inconclusive`, `no headroom`, `could not fail` or `not run`.
    effect
        The mean over blocks; `low`, `high` is Student's interval over blocks, `p_value` tests the margin. For `within`,
        the metric.
    over_items
        The same mean with its bootstrap interval over test questions; None for `within`.
    seeds
        Number of blocks.
    why
        Why it was not run, or what decided.
    """

    verdict: str
    effect: Metric | None = None
    over_items: Metric | None = None
    seeds: int = 0
    why: str = ""

    @property
    def p_value(self) -> float | None:
        """Of the test against the margin; None where there was none."""
        return self.effect.p_value if self.effect else None


def load_claims(path: Path | None = None) -> list[dict]:
    """The claims of `book/claims.yaml`, in order; the file's header describes the fields."""
    return yaml.safe_load((path or project_root() / "book" / "claims.yaml").read_text(encoding="utf-8"))


def judgements(records: dict[str, Record], claims: Sequence[dict]) -> list[Judgement]:
    """A judgement for each claim. Holm's correction is over those of `claims` that compare, by table of the paper.

    A comparison that has not been run yet counts with p = 1, so that no verdict weakens when it is.
    """
    judged = [judge(claim, records) for claim in claims]
    for table in {claim["paper"] for claim in claims}:
        family = [i for i, claim in enumerate(claims) if claim["paper"] == table and claim["test"]["kind"] in SIDES]
        p_values = [1.0 if judged[i].p_value is None else judged[i].p_value for i in family]
        adjusted = multipletests(p_values, method="holm")[1] if family else []
        for i, p_value in zip(family, adjusted, strict=True):
            if judged[i].verdict in ("reproduced", "not reproduced") and p_value >= LEVEL:
                why = f"p = {p_value:.3f} after Holm's correction over {len(family)} claims"
                judged[i] = replace(judged[i], verdict="inconclusive", why=why)
    return judged


def judge(claim: dict, records: dict[str, Record]) -> Judgement:
    """The judgement of one claim by itself, before Holm's correction.

    `greater` and `concave` are judged over blocks: the effect of a block is the mean over test items of
    `first - second`, or of `2 middle - low - high`. `within` asks whether a metric lies in [low, high].

    Raises
    ------
    InputError
        Another kind of test, an unknown endpoint, a mixed block, or a record that no claim may rest on.
    """
    test = claim["test"]
    if test["kind"] == "none":
        return Judgement("not run", why=test["why"])
    if test["kind"] not in ("within", *SIDES):
        raise InputError(
            f"claims.yaml: claim {claim['claim']!r}: test.kind = {test['kind']!r}; "
            f"use within, {', '.join(SIDES)} or none"
        )
    if "base" in claim and (without := _without_headroom(claim["base"], records)):
        return without
    if test["kind"] == "within":
        return _within(test, records)
    sides = [test[key] for key in SIDES[test["kind"]]]
    of_sides = [named(records, side["record"]) for side in sides]
    if not all(of_sides):
        return Judgement("not run", why="no record")
    paired = blocks(of_sides)
    if not paired:
        return Judgement("not run", why="no block in common")
    weights = list(SIDES[test["kind"]].values())
    gaps = [_gaps(block, sides, weights, test["endpoint"], claim) for block in paired.values()]
    if not any(gaps):
        return Judgement("not run", why=f"the records have no {test['endpoint']}")
    if any(gap.keys() != gaps[0].keys() for gap in gaps):
        raise InputError(f"claims.yaml: claim {claim['claim']!r}: its blocks do not have one set of {test['endpoint']}")
    over_items = intervals.mean(np.mean([[gap[i] for i in sorted(gaps[0])] for gap in gaps], axis=0))
    means = [float(np.mean(list(gap.values()))) for gap in gaps]
    if len(means) < claim.get("min_seeds", MIN_SEEDS):
        effect = Metric(float(np.mean(means)), len(means))
        why = f"{len(means)} of {claim.get('min_seeds', MIN_SEEDS)} blocks"
        return Judgement("inconclusive", effect, over_items, len(means), why)
    effect = intervals.over_seeds(means, test["margin"])
    verdict = "inconclusive"
    if effect.p_value < LEVEL:
        verdict = "reproduced" if effect.value > test["margin"] else "not reproduced"
    return Judgement(verdict, effect, over_items, len(means))


def _within(test: dict, records: dict[str, Record]) -> Judgement:
    runs = named(records, test["first"]["record"])
    if not runs:
        return Judgement("not run", why="no record")
    metric = runs[0].metric(test["first"]["metric"])
    if quantity := test.get("without_systems"):
        null = null_model.without_systems(runs[0], [test["theta"]])[quantity]
        if ((null >= test["low"]) & (null <= test["high"])).any():
            why = f"a model without two systems gives {null.min():.2f} to {null.max():.2f}, and so passes too"
            if not ((null >= test["low"]) & (null <= test["high"])).all():
                why += " in at least one of its forms"
            return Judgement("could not fail", metric, seeds=len(runs), why=why)
    inside = test["low"] <= metric.value <= test["high"]
    return Judgement("reproduced" if inside else "not reproduced", metric, seeds=len(runs))


def _without_headroom(base: dict, records: dict[str, Record]) -> Judgement | None:
    runs = named(records, base["record"])
    if runs and runs[0].metric(base["metric"]).value <= base["at_most"]:
        value = runs[0].metric(base["metric"])
        return Judgement("no headroom", value, why=f"the base model is at {value.share()}")
    return None


def _gaps(
    block: Sequence[Record], sides: Sequence[dict], weights: Sequence[int], endpoint: str, claim: dict
) -> dict[str, float]:
    """The effect in each test item of a block."""
    values = [_values(record, side["stage"], endpoint) for record, side in zip(block, sides, strict=True)]
    if any(side.keys() != values[0].keys() for side in values):
        names = ", ".join(record.name for record in block)
        raise InputError(f"claims.yaml: claim {claim['claim']!r}: {names} do not have one set of {endpoint}")
    return {i: sum(w * side[i] for w, side in zip(weights, values, strict=True)) for i in values[0]}


def _values(record: Record, stage: str, endpoint: str) -> dict[str, float]:
    name, system = re.fullmatch(r"([a-z]+)([12]?)", endpoint).groups()
    if name not in ENDPOINTS:
        raise InputError(f"claims.yaml: endpoint = {endpoint!r}; use {', '.join(ENDPOINTS)}, with 1 or 2 for a system")
    field = ENDPOINTS[name]
    return {
        item["id"]: float(item[field])
        for item in record.items
        if item["stage"] == stage and field in item and (not system or item["system"] == int(system))
    }


def scoreboard(
    records: dict[str, Record],
    claims: Sequence[dict] | None = None,
    link: Callable[[Record], str] | None = None,
    own: dict[str, Record] | None = None,
    run: bool | None = None,
) -> pd.DataFrame:
    """One row per claim, those not run last: verdict, effect with both intervals, blocks, and the records as evidence.

    Parameters
    ----------
    records
        By name, as `records.study` gives them. The verdict rests on these alone.
    own
        Records of a reader's run, by name: its effect stands beside, where it has what the claim compares.
    claims
        Claims from `load_claims`; None judges all.
    link
        Gives a record's address; column `evidence` is then HTML with a link to each record.
    run
        Only claims that have been run, by the study or by `own`, or only those that have not; None: both.
    """
    claims = load_claims() if claims is None else claims
    rows = []
    for claim, judged in zip(claims, judgements(records, claims), strict=True):
        sides = [side["record"] for side in claim["test"].values() if isinstance(side, dict)]
        evidence = {name: named(records, name) for name in dict.fromkeys(sides)}
        effect_of_own = _written_of_own(claim, own) if own else "–"
        has_run = judged.verdict != "not run" or not effect_of_own.startswith("–")
        if run is not None and run != has_run:
            continue
        rows.append(
            {
                "claim": claim["claim"],
                "paper": claim["paper"],
                "verdict": f"{judged.verdict}: {judged.why}" if judged.why else judged.verdict,
                "effect": written(claim, judged),
                **({"this run": effect_of_own} if own else {}),
                "blocks": judged.seeds or "–",
                "evidence": "; ".join(cite(name, runs, link) for name, runs in evidence.items()) or "–",
            }
        )
    return pd.DataFrame(sorted(rows, key=lambda row: row["verdict"].startswith("not run")))


def _written_of_own(claim: dict, own: dict[str, Record]) -> str:
    """The effect in a reader's run, whose arms may be of several commits: then they are not compared."""
    try:
        return written(claim, judge(claim, own))
    except InputError as error:
        return f"– ({error})"


def written(claim: dict, judged: Judgement, *, items: bool = True) -> str:
    """The effect in its unit, with its interval over blocks, and, with `items`, that over test questions."""
    if judged.effect is None:
        return "–"
    if claim["test"]["kind"] == "within" or judged.verdict == "no headroom":
        return f"{judged.effect.value:.3f}"
    in_nats = claim["test"]["endpoint"].startswith("loss")
    unit, form, name = (1, "+z.3f", "nats") if in_nats else (100, "+z.1f", "points")

    def interval(metric: Metric, over: str) -> str:
        return "" if metric.low is None else f", [{unit * metric.low:{form}}, {unit * metric.high:{form}}] over {over}"

    over_items = interval(judged.over_items, "questions") if items else ""
    return f"{unit * judged.effect.value:{form}} {name}{interval(judged.effect, 'blocks')}{over_items}"


def named(records: dict[str, Record], name: str) -> list[Record]:
    """The record `name`, or the records of experiment `name` at every seed, by seed."""
    runs = [record for key, record in records.items() if re.fullmatch(rf"{re.escape(name)}(-seed\d+)?", key)]
    return sorted(runs, key=lambda record: record.run["seed"])
