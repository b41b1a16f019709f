"""This run beside the published one: do votes, importance, answers and training agree, and if not, why may they not?"""

from collections.abc import Iterable, Sequence

import pandas as pd
import scipy

from lorapar_utils.models.published import published_adapters
from lorapar_utils.records import Record, own_records, published_records, read_record
from lorapar_utils.report.tables import written
from lorapar_utils.settings import Settings

# From here on two runs agree. Equal arithmetic gives 1; bf16 beside fp32, whose votes differ too, gave 0.986 and 0.64.
RANK_CORRELATION, JACCARD = 0.99, 0.85
LEVEL = 0.95


def verdicts(settings: Settings) -> pd.DataFrame:
    """One row for each comparison that this run allows: what was compared, how far it agrees, the verdict and why."""
    own = own_records(settings)
    published = published_records(settings.profile)
    rows = []
    teachers = votes(own.get("voting"), published.get("voting"))
    if len(teachers):
        equal, compared = int(teachers["equal"].sum()), int(teachers["examples"].sum())
        said = f"{equal:,} of {compared:,} equal, example by example"
        rows.append(_row("votes", said, equal == compared, own["voting"], published["voting"]))
    systems = importance(own.get("importance"), published.get("importance"), own.get("again"))
    if len(systems):
        lowest = systems["rank correlation"].min()
        agrees, said = lowest >= RANK_CORRELATION, f"rank correlation of matrices at least {lowest:.4f}"
        if "Jaccard index" in systems:
            agrees &= systems["Jaccard index"].min() >= JACCARD
            said += f", Jaccard index of selected elements at least {systems['Jaccard index'].min():.3f}"
        rows.append(_row("importance", said, agrees, own["importance"], published["importance"]))
    for row in adapters(own.get("again")).itertuples():
        said = f"{row.same} of {row.questions} right or wrong as published, {row.identical} in the same words"
        trained, low = read_record(published_adapters()[row.adapter] / "record.json"), own["again"].environment["dtype"]
        more = [] if low == "float32" else [f"in {low} an answer also depends on the questions that share its batch"]
        agrees = row.same == row.questions
        rows.append(_row(f"published adapter {row.adapter}", said, agrees, own["again"], trained, more))
    live = training(own.values(), published.values())
    for name, group in live.groupby("record", sort=False) if len(live) else ():
        inside, count = int(group["inside"].sum()), len(group)
        said = f"{inside} of {count} accuracies inside the spread of the published seeds"
        record, beside = (next(r for r in some.values() if r.experiment == name) for some in (own, published))
        rows.append(_row(f"training, {group['experiment'].iloc[0]}", said, inside == count, record, beside))
    return pd.DataFrame(rows, columns=["compared", "agreement", "verdict", "because"])


def _row(what: str, said: str, agrees: bool, own: Record, published: Record, more: Sequence[str] = ()) -> dict:
    """A verdict and its reason; `more` are reasons beside the machines'."""
    why, unknown = differences(own, published)
    why += more
    if agrees:
        verdict, because = "agrees", "–"
    elif why:
        verdict, because = "differs, for a known reason", "; ".join(why)
    elif unknown:
        verdict, because = "differs, for a reason not recorded", f"a record does not name its {', '.join(unknown)}"
    else:
        verdict, because = "differs, and should not", "dtype, versions and instruction sets are equal: please report it"
    return {"compared": what, "agreement": said, "verdict": verdict, "because": because}


# What of a record's environment may change a number -> where it is. No GPU is a known value.
MACHINE = {
    "dtype": ("dtype",),
    "instruction sets": ("hardware", "instructions"),
    "GPU": ("hardware", "gpu"),
    **{name: ("packages", name) for name in ("torch", "transformers", "peft", "trl")},
}


def differences(own: Record, published: Record) -> tuple[list[str], list[str]]:
    """What of the two machines may change a number, in words, and what one of the records does not say."""
    words, unknown = [], []
    for name, keys in MACHINE.items():
        here, there = (_value(record.environment, keys) for record in (own, published))
        if name != "GPU" and None in (here, there):
            unknown.append(name)
        elif here != there:
            words.append(f"{name} {_text(here)} here, {_text(there)} there")
    return words, unknown


def _value(environment: dict | None, keys: Sequence[str]) -> object:
    for key in keys:
        environment = environment.get(key) if environment else None
    return environment


def _text(value: object) -> str:
    return "+".join(value) if isinstance(value, list) else str(value or "none")


def votes(own: Record | None, published: Record | None) -> pd.DataFrame:
    """One row per teacher of both runs: the examples that both asked about, and how many votes are equal."""
    if own is None or published is None:
        return pd.DataFrame()
    theirs = {item["id"]: item["votes"] for item in published.items}
    rows: dict[str, list[bool]] = {}
    for item in own.items:
        for teacher, vote in item["votes"].items():
            if teacher in theirs.get(item["id"], {}):
                rows.setdefault(teacher, []).append(vote == theirs[item["id"]][teacher])
    return pd.DataFrame(
        [{"teacher": name, "examples": len(equal), "equal": sum(equal)} for name, equal in rows.items()]
    )


def importance(own: Record | None, published: Record | None, again: Record | None = None) -> pd.DataFrame:
    """One row per system: rank correlation of the matrices' mean scores, and Jaccard index of the selected elements."""
    if own is None or published is None:
        return pd.DataFrame()
    places = ["layer", "module", "matrix"]
    tables = [pd.DataFrame(record.result["tables"]["map"]) for record in (own, published)]
    joined = tables[0].merge(tables[1], on=places, suffixes=("", "_published"))
    metrics = again.metrics if again else {}
    rows = []
    for system in (1, 2):
        ranks = joined[[f"system{system}", f"system{system}_published"]].rank()
        row = {"system": system, "matrices": len(joined), "rank correlation": ranks.corr().iloc[0, 1]}
        if jaccard := metrics.get(f"partition/system{system}"):
            row["Jaccard index"] = jaccard.value
        rows.append(row)
    return pd.DataFrame(rows)


def adapters(again: Record | None) -> pd.DataFrame:
    """One row per published adapter: its accuracy as published and here, over the same questions, item by item."""
    if again is None:
        return pd.DataFrame()
    frame = pd.DataFrame(again.items)
    rows = []
    for name, items in frame.groupby("adapter", sort=False):
        published = pd.DataFrame(items["published"].tolist(), index=items.index)
        rows.append(
            {
                "adapter": name,
                "questions": len(items),
                "right, published": int(published["correct"].sum()),
                "right, here": int(items["correct"].sum()),
                "same": int((items["correct"] == published["correct"]).sum()),
                "identical": int((items["completion"] == published["completion"]).sum()),
            }
        )
    return pd.DataFrame(rows)


def training(own: Iterable[Record], published: Iterable[Record]) -> pd.DataFrame:
    """One row per accuracy that this run trained: beside the published seeds' mean and the range for one more seed.

    The range is the 95 % prediction interval of a normal distribution with the seeds' mean and spread.
    """
    seeds: dict[str, list[Record]] = {}
    for record in published:
        seeds.setdefault(record.experiment, []).append(record)
    rows = []
    for record in own:
        runs = seeds.get(record.experiment, [])
        stages = [f"stage{k}" for k in range(1, 1 + len(record.run["parameters"].get("stages", ())))]
        for key in [f"{stage}/system{k}" for stage in stages for k in (1, 2)]:
            values = pd.Series([run.metrics[key].value for run in runs if key in run.metrics])
            metric = record.metrics.get(key)
            if metric is None or len(values) < 2:
                continue
            reach = scipy.stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std() * (1 + 1 / len(values)) ** 0.5
            low, high = max(0.0, values.mean() - reach), min(1.0, values.mean() + reach)
            rows.append(
                {
                    "record": record.experiment,
                    "experiment": record.run["parameters"]["title"],
                    "after": key.split("/")[0],
                    "system": key[-1],
                    "this run": written(metric),
                    "published, mean": f"{100 * values.mean():.1f} %",
                    "seeds": len(values),
                    "one more seed": f"{100 * low:.1f} to {100 * high:.1f} %",
                    "inside": low <= metric.value <= high,
                }
            )
    return pd.DataFrame(rows)
