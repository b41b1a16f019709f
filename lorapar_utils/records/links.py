"""Links from pages to records."""

from collections.abc import Callable, Sequence

from lorapar_utils.records.record import Record
from lorapar_utils.settings import Settings, project_root


def record_link(record: Record, settings: Settings) -> str:
    """Address of `record` from `notebooks/`: in the runs of `settings.profile`, or among the published records."""
    profile, name = record.run["profile"], f"{record.name}.json"
    if (settings.runs / "explored" / name).is_file():
        return f"../runs/{profile}/explored/{name}"
    published = (project_root() / "results" / profile / name).is_file()
    own = profile == settings.profile and ((settings.runs / "records" / name).is_file() or not published)
    return f"../runs/{profile}/records/{name}" if own else f"../results/{profile}/{name}"


def cite(name: str, records: Sequence[Record], link: Callable[[Record], str] | None) -> str:
    """An experiment with its seeds, or "(no record)"; HTML if `link`, which gives a record's address, is not None."""
    if not records:
        return f"{name} (no record)"

    if len(records) == 1 and records[0].name == name.rpartition("/")[2]:
        return linked_text(name, records[0], link)
    seeds = ", ".join(linked_text(f"seed {record.run['seed']}", record, link) for record in records)
    return f"{name} ({seeds})"


def linked_text(text: str, record: Record, link: Callable[[Record], str] | None) -> str:
    """`text` as a link to the record, whose name, commit and date hovering tells; plain if `link` is None."""
    if link is None:
        return text
    run = record.run
    title = f"{record.name} of profile {run['profile']}, commit {(run['commit'] or 'none')[:10]}, made {run['created']}"
    return f'<a class="result" href="{link(record)}" title="{title}">{text}</a>'
