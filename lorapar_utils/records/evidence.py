"""Which records belong together: the published evidence, this run's records, and seeds that can be paired."""

from collections.abc import Iterable, Sequence

from lorapar_utils.records.intervals import Metric
from lorapar_utils.records.record import Record, read_records
from lorapar_utils.settings import Settings, project_root

# Folders of `results/` with the published evidence -> what their records' names begin with. Of two records with one
# name the first counts. Profiles `cpu…` came before `study`, from another pool, so no table mixes them.
EVIDENCE = {
    "study": "study/",
    "cpu": "",
    "cpu-full": "",
    "cpu-chains": "cpu-chains/",
    "cpu-elsewhere": "cpu-elsewhere/",
}


def published_records(profile: str) -> list[Record]:
    """The committed records of `profile`, in name order; empty if none was published."""
    return list(read_records(project_root() / "results" / profile).values())


def evidence() -> dict[str, Record]:
    """The published records on which every statement of the book rests, whatever profile built it."""
    records: dict[str, Record] = {}
    for profile, prefix in EVIDENCE.items():
        for record in published_records(profile):
            records.setdefault(f"{prefix}{record.name}", record)
    return records


def study() -> dict[str, Record]:
    """The published records of the study, by name: the claims rest on these alone."""
    return {record.name: record for record in published_records("study")}


def pooled(records: dict[str, Record]) -> dict[str, Record]:
    """Those of `evidence` that were made from one pool; tables pair no others."""
    return {name: record for name, record in records.items() if "/" not in name}


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
