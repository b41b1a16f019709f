"""Votes from a CSV or Parquet file."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from lorapar_utils.errors import InputError
from lorapar_utils.settings import RecordedTeacher
from lorapar_utils.voting import Ballot, Teacher

# A column of numbers, plain or as spreadsheets write them, or a column of names; 0 is an abstention in both.
CELLS = (re.compile(r"([12]|0)(?:[.,]0+)?"), re.compile(r"(?:system\s*|s)([12])|0", re.I))
WANTED = "a CSV or Parquet file with columns id and system"


def recorded_teacher(section: RecordedTeacher, ids: Sequence[str]) -> Teacher:
    """A teacher whose votes on the examples `ids` stand in a file."""
    votes = _read_votes(section, ids)

    def ask(asked: Sequence[dict], answered: Callable[[int, Ballot], None]) -> None:
        for i, example in enumerate(asked):
            system = votes[example["id"]]
            answered(i, Ballot(system=system, reason="" if system else "recorded as an abstention"))

    return Teacher(section.name, None, lambda example: "", ask)


def _read_votes(section: RecordedTeacher, ids: Sequence[str]) -> dict[str, int]:
    where = f"teacher {section.name!r}: {section.path}"
    rows = _rows(where, read_votes_file(section))
    lines: dict[str, int] = {}
    for line, identifier, _ in rows:
        if not identifier:
            raise InputError(f"{where}: line {line} has no id; write one, or remove the line")
        if identifier in lines:
            raise InputError(
                f"{where}: id {identifier!r} is there twice, in lines {lines[identifier]} and {line}; "
                "keep one vote an example"
            )
        lines[identifier] = line
    unknown = sorted(lines.keys() - set(ids))
    unknown_ids = f"{len(unknown)} ids are not of this pool's training split, first {unknown[0]!r}" if unknown else ""
    if unknown and re.fullmatch(r"[\d.,:/+\-eE]+", unknown[0]):
        unknown_ids += " (did a spreadsheet turn ids into numbers or dates? format the column as text)"
    if missing := sorted(set(ids) - lines.keys()):
        raise InputError(
            f"{where}: {len(missing)} of {len(ids)} examples have no vote, first {missing[0]!r}"
            f"{'; ' if unknown_ids else ''}{unknown_ids}; add a line for each, with 0 for an abstention"
        )
    if unknown:
        raise InputError(f"{where}: {unknown_ids}; was it recorded on another pool or seed?")
    pattern = max(CELLS, key=lambda cells: sum(bool(cells.fullmatch(cell)) for _, _, cell in rows))
    votes = {}
    for line, identifier, cell in rows:
        vote = pattern.fullmatch(cell)
        if vote is None:
            problem = f"has system = {cell}" if cell else "has no system"
            raise InputError(
                f"{where}: id {identifier!r} {problem}; use 1, 2, or 0 for an abstention, in every line (line {line})"
            )
        votes[identifier] = int(vote[1] or 0)
    return votes


def _rows(where: str, data: bytes) -> list[tuple[int, str, str]]:
    """Line, id and system of every row."""
    header, *rows = _parquet_table(where, data) if data.startswith(b"PAR1") else _csv_table(where, data)
    names = [name.lower() for name in header[1]]
    if missing := {"id", "system"} - set(names):
        raise InputError(
            f"{where} lacks column {', '.join(sorted(missing))}; it has {', '.join(filter(None, header[1]))}"
        )
    if repeated := [name for name in ("id", "system") if names.count(name) > 1]:
        raise InputError(f"{where} has column {repeated[0]} more than once; keep one")
    places = [names.index("id"), names.index("system")]
    for line, cells in rows:
        if any(cells[len(names) :]):
            raise InputError(
                f"{where}: line {line} ({', '.join(cells)}) has more cells than the first line has columns; put cells "
                "with a separator inside in double quotes"
            )
    return [(line, *(cells[place] if place < len(cells) else "" for place in places)) for line, cells in rows]


def _parquet_table(where: str, data: bytes) -> list[tuple[int, list[str]]]:
    try:
        frame = pd.read_parquet(io.BytesIO(data))
    except (ValueError, OSError, NotImplementedError) as error:  # the last is how Arrow refuses a kind of Parquet
        raise InputError(f"{where} is not readable as Parquet ({error}); name {WANTED}") from None
    frame = frame.reset_index() if "id" in frame.index.names else frame
    frame = frame.astype(object).where(frame.notna(), "")
    cells = [[str(cell).strip() for cell in row] for row in [list(frame.columns), *frame.to_numpy().tolist()]]
    return list(enumerate(cells))


def _csv_table(where: str, data: bytes) -> list[tuple[int, list[str]]]:
    """Lines that are not blank, with line numbers; the separator is the one that gives columns id and system."""
    if data.startswith((b"PK", b"\xd0\xcf\x11\xe0", b"\x1f\x8b")):
        raise InputError(f"{where} is a spreadsheet or an archive; save it as CSV with columns id and system")
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{where} is no UTF-8 text; save it as CSV in UTF-8, with columns id and system")
    text = re.sub(r'^\s*"?sep=."?', "", text)  # a line that only Excel reads

    def fit(separator: str) -> tuple[bool, int]:
        names = next(csv.reader(text.lstrip().splitlines()[:1], delimiter=separator, skipinitialspace=True), [])
        return {"id", "system"} <= {name.strip().lower() for name in names}, len(names)

    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t|", key=fit), skipinitialspace=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise InputError(f"{where}: line {reader.line_num} is not readable ({error}); is a quote open?") from None
    if not (filled := [(line, cells) for line, cells in rows if any(cells)]):
        raise InputError(f"{where} is empty; name {WANTED}")
    return filled


def read_votes_file(section: RecordedTeacher) -> bytes:
    try:
        return Path(section.path).expanduser().read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: `~` without a home
        raise InputError(
            f"teacher {section.name!r}: path = {section.path}: {getattr(error, 'strerror', error)}; name {WANTED}"
        ) from None
