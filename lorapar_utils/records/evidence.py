"""Which records belong together: the published evidence, this run's records, and seeds that can be paired."""

from collections.abc import Iterable, Sequence

from lorapar_utils.records.intervals import Metric
from lorapar_utils.records.record import Record, read_records
from lorapar_utils.settings import Settings, project_root


def published_records(profile: str) -> dict[str, Record]:
    """The committed records of `profile` by name; empty if none was published."""
    return read_records(project_root() / "results" / profile)


def study() -> dict[str, Record]:
    """The published records of the study: every statement of the book on training rests on these alone."""
    return published_records("study")


def published_votes() -> dict[str, Record]:
    """The published record `voting`, by name: that of `laptop`, because the study's labels are its generators'."""
    return {name: record for name, record in published_records("laptop").items() if name == "voting"}


def own_records(settings: Settings) -> dict[str, Record]:
    """The records of this run: of `runs/<profile>/`, by name."""
    return read_records(settings.runs / "records")


def common_seeds(sides: Sequence[Sequence[Record]]) -> list[list[Record]]:
    """Each side's records at the seeds that all sides have, because other seeds cannot be paired."""
    seeds = set.intersection(*({record.run["seed"] for record in side} for side in sides))
    return [[record for record in side if record.run["seed"] in seeds] for side in sides]


def score_after(record: Record, stage: str) -> Metric | None:
    """Accuracy after `stage`, or overlap where the pool's answers are free text; None if not measured."""
    metrics = record.metrics
    return metrics.get(f"{stage}/accuracy", metrics.get(f"{stage}/overlap"))


def mean_outcomes(records: Iterable[Record], stage: str, system: int | None = None) -> dict[str, float]:
    """Each test item's score after `stage`, averaged over the records (an experiment's seeds).

    A score is 1 for a right answer and 0 for a wrong one. For free text it is the overlap with the reference.
    """
    scores: dict[str, list[float]] = {}
    for record in records:
        for item in record.items:
            if item["stage"] == stage and (system is None or item.get("system") == system):
                scores.setdefault(item["id"], []).append(item.get("overlap", item["correct"]))
    return {key: sum(values) / len(values) for key, values in scores.items()}
