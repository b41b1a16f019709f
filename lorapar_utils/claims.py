"""The paper's claims, judged from records by criteria that were written down before the run."""

from pathlib import Path

import pandas as pd
import yaml

from lorapar_utils import statistics
from lorapar_utils.errors import InputError
from lorapar_utils.records import Record
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

    `greater`: paired over test items, reproduced if the 95 % interval of `first - second` lies above `margin`, not
    reproduced if below. `within`: reproduced if the metric lies in [low, high].
    """
    kind = claim["test"]["kind"]
    if kind == "none":
        return "not run", claim["test"]["why"], None
    names = [claim["test"][key]["record"] for key in ("first", "second") if key in claim["test"]]
    if any(name not in records for name in names):
        return "not run", "no record", None
    if kind == "within":
        where = claim["test"]["first"]
        metric = records[where["record"]].metric(where["metric"])
        inside = claim["test"]["low"] <= metric["value"] <= claim["test"]["high"]
        return "reproduced" if inside else "not reproduced", f"{metric['value']:.3f}", metric["n"]
    if kind == "greater":
        first, second = (_outcomes(records, claim["test"][key]) for key in ("first", "second"))
        common = sorted(set(first) & set(second))
        if not common:
            return "not run", "no common items", None
        gap = statistics.paired_difference([second[i] for i in common], [first[i] for i in common])
        effect = f"{100 * gap['value']:+.1f} points [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
        if gap["n"] < claim["min_n"]:
            return "inconclusive", effect, gap["n"]
        margin = claim["test"]["margin"]
        verdict = "reproduced" if gap["low"] > margin else "not reproduced" if gap["high"] < margin else "inconclusive"
        return verdict, effect, gap["n"]
    raise InputError(f"claims.yaml: claim {claim['claim']!r}: test.kind = {kind!r}; use greater, within or none")


def _outcomes(records: dict[str, Record], where: dict) -> dict[str, bool]:
    items = [item for item in records[where["record"]].items if item["stage"] == where["stage"]]
    if "system" in where:
        items = [item for item in items if item["system"] == where["system"]]
    return {item["id"]: item["correct"] for item in items}
