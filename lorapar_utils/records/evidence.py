"""Which records belong together: this run's and the published ones, and seeds that can be paired."""

from collections.abc import Iterable, Sequence

from lorapar_utils.records.intervals import Metric
from lorapar_utils.records.record import Record, read_records
from lorapar_utils.settings import Settings, project_root


def published_records(profile: str) -> list[Record]:
    """The committed records of `profile`, in name order; empty if none was published."""
    return list(read_records(project_root() / "results" / profile).values())


def evidence(settings: Settings) -> dict[str, Record]:
    """The records that claims are judged by: this run's and the published `<profile>-full` (see `with_longer`)."""
    return with_longer(read_records(settings.runs / "records"), settings.profile)


def with_longer(own: dict[str, Record], profile: str) -> dict[str, Record]:
    """`own` plus the published records of profile `<profile>-full`; where both have a record, `own` wins."""
    return {record.name: record for record in published_records(f"{profile}-full")} | own


def companions(profile: str) -> dict[str, Record]:
    """Published records of the profiles that vary `profile`, such as `<profile>-chains`, by `<profile>-chains/<name>`.

    Profile `<profile>-full` is left out, because `with_longer` adds those records to `profile`'s own.
    """
    folders = [path for path in sorted((project_root() / "results").glob(f"{profile}-*")) if path.is_dir()]
    return {
        f"{folder.name}/{record.name}": record
        for folder in folders
        if folder.name != f"{profile}-full"
        for record in published_records(folder.name)
    }


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
