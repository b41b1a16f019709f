"""The paper's claims, judged from records by criteria that were written down before the run."""

import re
from pathlib import Path

import pandas as pd
import yaml

from lorapar_utils import statistics
from lorapar_utils.errors import InputError
from lorapar_utils.records import Record, mean_outcomes
from lorapar_utils.settings import project_root

VERDICTS = ("reproduced", "not reproduced", "inconclusive", "not run")


def load_claims(path: Path | None = None) -> list[dict]:
    """The declared claims, in order; see the header of `book/claims.yaml` for the fields."""
    return yaml.safe_load((path or project_root() / "book" / "claims.yaml").read_text())


def scoreboard(records: dict[str, Record], claims: list[dict] | None = None) -> pd.DataFrame:
    """One row a claim: verdict, effect with interval, n, evidence."""
    rows = []
    for claim in load_claims() if claims is None else claims:
        verdict, effect, n = judge(claim, records)
        rows.append(
            {"claim": claim["claim"], "paper": claim["paper"], "verdict": verdict, "effect": effect, "n": n or "–"}
        )
    return pd.DataFrame(rows)


def judge(claim: dict, records: dict[str, Record]) -> tuple[str, str, int | None]:
    """Verdict, effect in words and n of one claim.

    `greater`: paired over test items (each its mean over the seeds there are), reproduced if the 95 % interval of
    `first - second` lies above `margin`, not reproduced if below. `within`: reproduced if the metric lies in
    [low, high].
    """
    kind = claim["test"]["kind"]
    if kind == "none":
        return "not run", claim["test"]["why"], None
    names = [claim["test"][key]["record"] for key in ("first", "second") if key in claim["test"]]
    if not all(_named(records, name) for name in names):
        return "not run", "no record", None
    if kind == "within":
        where = claim["test"]["first"]
        metric = _named(records, where["record"])[0].metric(where["metric"])
        inside = claim["test"]["low"] <= metric["value"] <= claim["test"]["high"]
        return "reproduced" if inside else "not reproduced", f"{metric['value']:.3f}", metric["n"]
    if kind == "greater":
        sides = (claim["test"]["first"], claim["test"]["second"])
        first, second = (mean_outcomes(_named(records, s["record"]), s["stage"], s.get("system")) for s in sides)
        common = sorted(set(first) & set(second))
        if not common:
            return "not run", "no common items", None
        gap = statistics.mean([first[i] - second[i] for i in common])
        effect = f"{100 * gap['value']:+.1f} points [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
        if gap["n"] < claim["min_n"]:
            return "inconclusive", effect, gap["n"]
        margin = claim["test"]["margin"]
        verdict = "reproduced" if gap["low"] > margin else "not reproduced" if gap["high"] < margin else "inconclusive"
        return verdict, effect, gap["n"]
    raise InputError(f"claims.yaml: claim {claim['claim']!r}: test.kind = {kind!r}; use greater, within or none")


def _named(records: dict[str, Record], name: str) -> list[Record]:
    """The record of that name, or an experiment's records at every seed."""
    return [record for key, record in records.items() if re.fullmatch(rf"{re.escape(name)}(-seed\d+)?", key)]
