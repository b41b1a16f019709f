"""Links from pages to records."""

import os
from collections.abc import Callable, Sequence

from lorapar_utils.records.record import Record
from lorapar_utils.settings import Settings, project_root


def record_link(record: Record, settings: Settings) -> str:
    """Address of `record` from the working directory: in the runs of `settings.profile`, or among those published.

    JupyterLab starts a notebook where it lies, and papermill writes `out.ipynb` where it was started.
    """
    name = f"{record.name}.json"
    published = project_root() / "results" / record.run["profile"] / name
    if record.run["profile"] != settings.profile:
        return os.path.relpath(published)
    explored, made = (settings.runs / folder / name for folder in ("explored", "records"))
    return os.path.relpath(next((path for path in (explored, made, published) if path.is_file()), made))


def cite(name: str, records: Sequence[Record], link: Callable[[Record], str] | None) -> str:
    """An experiment with its seeds, or "(no record)"; HTML if `link`, which gives a record's address, is not None."""
    if not records:
        return f"{name} (no record)"

    if len(records) == 1 and records[0].name == name.rpartition("/")[2]:
        return linked_text(name, records[0], link)
    seeds = ", ".join(linked_text(f"seed {record.run['seed']}", record, link) for record in records)
    return f"{name} ({seeds})"


def is_tuning(record: Record) -> bool:
    """Whether a run chose settings."""
    return record.run["parameters"].get("sweep") == "tuning"


def cite_tuning(records: Sequence[Record], link: Callable[[Record], str]) -> str:
    """Runs that chose settings, by number, because there are dozens; hovering tells their names."""
    numbered = (linked_text(str(number), record, link) for number, record in enumerate(records, start=1))
    return f"tuning {', '.join(numbered)}"


def linked_text(text: str, record: Record, link: Callable[[Record], str] | None) -> str:
    """`text` as a link to the record, whose name, commit and date hovering tells; plain if `link` is None."""
    return text if link is None else f'<a class="result" href="{link(record)}" title="{_told(record)}">{text}</a>'


def linked_dots(seeds: Sequence[tuple[str, Record]], ends: tuple[float, float], link: Callable[[Record], str]) -> str:
    """HTML of a strip from the lower to the upper end, with a dot at each seed's value that is a link to its record."""
    low, high = ends
    # Styles are inline, because JupyterLab does not have the book's.
    strip = "display: inline-block; position: relative; width: 6rem; height: 9px; border-bottom: 1px solid #999"
    dot = "position: absolute; bottom: 1px; width: 7px; height: 7px; border-radius: 50%; opacity: 0.6"
    dots = [
        f'<a href="{link(record)}" title="{value}: {_told(record)}" aria-label="{record.name}: {value}" '
        f'style="{dot}; background: currentColor; left: {90 * (float(value) - low) / (high - low):.0f}%"></a>'
        for value, record in seeds
    ]
    return f'<span class="seeds" style="{strip}">{"".join(dots)}</span>'


def _told(record: Record) -> str:
    run = record.run
    return f"{record.name} of profile {run['profile']}, commit {(run['commit'] or 'none')[:10]}, made {run['created']}"
