"""The start of every notebook of the book, and its tables with links to records."""

import ast
import html
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial

import pandas as pd
from IPython import get_ipython
from IPython.display import Markdown, display
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from lorapar_utils.errors import InputError
from lorapar_utils.records import (
    Record,
    cite,
    cite_tuning,
    claim_runs,
    is_tuning,
    linked_dots,
    linked_text,
    own_records,
    published_records,
    published_votes,
    record_link,
    study,
)
from lorapar_utils.report import claims, drawing, tables
from lorapar_utils.settings import Settings, load_profile

DOTS = "Dots: one for each seed, from the least to the greatest value of the column; each is a link to its record."
# What the name of a column of single seeds' values ends with.
EACH_SEED = ", each seed"
# Metadata of an output that only says that there is nothing to show: the book leaves out a section of such alone.
NOTHING = {"lorapar": "nothing to show"}


def start(*, profile: str, **parameters) -> Settings:
    """Check the injected parameters, load the profile with `parameters` on top, and set the figure style.

    Parameters
    ----------
    profile
        Name or path of the profile.
    **parameters
        Settings that a reader may change in the notebook; None keeps the profile's value.

    Raises
    ------
    InputError
        Papermill injected a name that the notebook's parameters cell does not assign (papermill only warns), the
        profile is invalid, or `runs/<profile>/` belongs to another profile file.
    """
    _reject_unknown_parameters()
    _quiet()
    drawing.use_style()
    # The book's build asks for them; elsewhere nobody would see them.
    if (shell := get_ipython()) and os.environ.get("LORAPAR_NARROW"):
        shell.display_formatter.mimebundle_formatter.for_type(Figure, drawing.narrow_too)
    settings = load_profile(profile, **parameters)
    claim_runs(settings)
    print(f"profile {settings.profile}: results under runs/{settings.profile}/")
    if not settings.publishable:
        display(Markdown("**This profile is for testing the pipeline: its numbers mean nothing.**"))
    published, here = load_profile("study").model, settings.model
    if here.source != published.source:
        what = f"The published records are of {published.target_name}; a run of this profile is of `{here.source}`."
        display(Markdown(what))
    if settings.has_free_text:
        display(
            Markdown(
                "Its answers are free text: where a page says accuracy, read the overlap with the reference (chrF)."
            )
        )
    return settings


def published(settings: Settings, name: str) -> Record:
    """The published record `name` of this profile, else of the study or its votes: for a page that computes nothing."""
    records = study() | published_votes() | published_records(settings.profile)
    if name not in records:
        raise InputError(f"compute = False: no record {name} of profile {settings.profile} is published; compute it")
    return records[name]


def shown(frame: pd.DataFrame, otherwise: str = "Nothing to show yet.") -> Styler | None:
    """A table with its texts whole, or, of an empty one, a line that says so; an index with a name is a column."""
    if frame.empty:
        if otherwise:
            display(Markdown(otherwise), metadata=NOTHING)
        return None
    if any(frame.index.names):
        frame = frame.reset_index()
    if frame.columns.nlevels > 1:
        frame = frame.set_axis([", ".join(filter(None, map(str, names))) for names in frame.columns], axis=1)
    cells = frame.map(lambda cell: html.escape(cell).replace("\n", "<br>") if isinstance(cell, str) else cell)
    return _as_html(cells)


def linked(
    frame: pd.DataFrame, records: Iterable[Record], settings: Settings, otherwise: str = "No record yet."
) -> Styler | None:
    """A table of `tables` with links to records, whose tooltips have commit and date.

    Under the mean of a column that has each seed's values is a strip with a dot for each; a single seed's value is
    itself a link. Other tables keep the column `records`. Columns without a value are left out. Of an empty table it
    shows the line `otherwise`.
    """
    if frame.empty:
        return shown(frame, otherwise)
    frame = frame.loc[:, (frame.astype(str) != "–").any()]
    by_label = {tables.label(record): record for record in records}
    cells = frame.astype(object).map(lambda cell: html.escape(cell) if isinstance(cell, str) else cell)
    link = partial(record_link, settings=settings)
    behind = frame["records"].map(lambda names: [by_label[name] for name in names.split(", ")])
    of_seeds = [column for column in frame if column.endswith(EACH_SEED)]
    if not of_seeds:
        cells["records"] = ["; ".join(_cited(group, settings)) for group in behind]
        return _as_html(cells)
    has_dots = False
    for column in of_seeds:
        texts = frame[column].str.split(", ")
        # A seed without this score has a dash.
        pairs = [zip(*row, strict=False) for row in zip(texts, behind, strict=True)]
        seeds = [[pair for pair in row if pair[0] != "–"] for row in pairs]
        ends = _ends([[float(value) for value, _ in row] for row in seeds])
        has_dots |= ends is not None
        mean = column.removesuffix(EACH_SEED)
        cells[mean] = [_with_seeds(*row, ends, link) for row in zip(cells[mean], seeds, strict=True)]
    table = _as_html(cells.drop(columns=[*of_seeds, "records", *({"seeds"} & set(cells))]))
    return table.set_caption(DOTS) if has_dots else table


def _ends(rows: list[list[float]]) -> tuple[float, float] | None:
    """The least and greatest value of a column, or None if no row has two seeds."""
    if max(map(len, rows)) < 2:
        return None
    low, high = (end(value for row in rows for value in row) for end in (min, max))
    return low, max(high, low + 1e-9)


def _with_seeds(cell: str, seeds: list[tuple[str, Record]], ends: tuple | None, link: Callable) -> str:
    if not seeds:
        return cell
    if ends is None:
        value, interval = re.fullmatch(r"([^\[]*)(.*)", cell).groups()
        return linked_text(value.strip(), seeds[0][1], link) + f" {interval}"
    return f"{cell}<br>{linked_dots(seeds, ends, link)}"


def sources(records: Iterable[Record], settings: Settings) -> Styler:
    """The records behind a page: one row per experiment, with a link to the file of each seed; one for all tuning."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault((record.run["profile"], is_tuning(record)), []).append(record)
    link = partial(record_link, settings=settings)
    rows = []
    for (profile, tuning), group in sorted(groups.items()):
        texts = [cite_tuning(group, link)] if tuning else _cited(group, settings)
        rows += [{"profile": profile, "record": text} for text in texts]
    return _as_html(pd.DataFrame(rows))


def _cited(records: Iterable[Record], settings: Settings) -> list[str]:
    """Each experiment by name, with a link for each seed."""
    runs: dict[str, dict[int, Record]] = {}
    for record in records:
        runs.setdefault(record.experiment, {})[record.run["seed"]] = record
    link = partial(record_link, settings=settings)
    return [cite(name, [seeds[seed] for seed in sorted(seeds)], link) for name, seeds in sorted(runs.items())]


def scoreboard(settings: Settings, judged: list[dict] | None = None, *, run: bool = True) -> Styler | None:
    """The claims among `judged` (None: all) that have been run, or have not, by the published records.

    This run's effects stand beside; records are linked.
    """
    rows = claims.scoreboard(study(), judged, partial(record_link, settings=settings), own_records(settings), run)
    return _as_html(rows) if len(rows) else shown(rows, "None so far.")


def _as_html(frame: pd.DataFrame) -> Styler:
    """A frame of HTML cells, left-aligned, in the CSS class that JupyterLab and the book style."""
    frame = frame.apply(_equal_digits)
    style = frame.style.hide(axis="index").set_table_attributes('class="dataframe"')
    style = style.set_table_styles([{"selector": "th, td", "props": "text-align: left"}])
    return style.format(_shown)


def _equal_digits(column: pd.Series) -> pd.Series:
    """Numbers as texts with as many decimals as the longest of the column has; other columns as they are."""
    if column.dtype.kind != "f":
        return column
    texts = column.dropna().map("{:g}".format)
    if not texts.str.contains("e").any():
        decimals = texts.str.partition(".")[2].str.len().max() if len(texts) else 0
        texts = column.dropna().map(lambda value: f"{value:.{decimals}f}")
    return texts.reindex(column.index, fill_value="–")


def _shown(value: object) -> object:
    """A cell's text, with line breaks allowed only between value, interval, n and rank."""
    if isinstance(value, float):
        return f"{value:g}"
    if not isinstance(value, str):
        return value
    text = re.sub(r"\[[^]]*]", lambda interval: interval[0].replace(" ", "\N{NO-BREAK SPACE}"), value)
    return re.sub(r"(?<=\d) (?=%)|(?<=\b[nr]) (?==)|(?<=\b[nr] =) ", "\N{NO-BREAK SPACE}", text)


def _reject_unknown_parameters() -> None:
    cells = get_ipython().user_ns.get("In", []) if get_ipython() else []
    injected = next((cell for cell in cells if cell.lstrip().startswith("# Parameters")), None)
    if injected is None:
        return
    before = cells[: cells.index(injected)]
    parameters = set().union(*(_assigned(cell) for cell in before))
    unknown = sorted(_assigned(injected) - parameters)
    if unknown:
        raise InputError(
            f"papermill: {', '.join(unknown)} is no parameter of this notebook; it has {', '.join(sorted(parameters))}"
        )


def _assigned(source: str) -> set[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return set()
    targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _quiet() -> None:
    """Silence warnings that a reader cannot act on."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|peft|trl)")
    warnings.filterwarnings("ignore", message=".*IProgress not found.*")
    # For a notebook that imports transformers later, and for one that has.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.set_verbosity_error()
