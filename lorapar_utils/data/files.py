"""Find the files of each split of a data set, and read the rows, each with its place for error messages.

Deviations from `datasets.load_dataset`: only shards of one table are merged, so `train_socratic.jsonl` is not added to
`train.jsonl`. Each row keeps its own types, so that a message can name the line of a wrong one. Nothing is cached on
disk, so that a corrected file is read again.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import NamedTuple

import datasets
import pyarrow.parquet

from lorapar_utils.cache import file_hash
from lorapar_utils.errors import InputError

# Word in a file name -> split. `dev` is a separate split, because MMLU has both `dev` and `validation`.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "eval": "validation",
    "dev": "dev",
    "test": "test",
    "testing": "test",
    "evaluation": "test",
}
TEXT = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
SUFFIXES = (*TEXT, *(f"{suffix}.gz" for suffix in TEXT), ".parquet", ".arrow")
# Files beside data: notes of a saved `Dataset`, a repository's cards, and caches of `datasets`.
NO_DATA = re.compile(
    r"(dataset_infos?|dataset_dict|state|config|metadata|package)\.json|metadata\.(jsonl|csv)|readme\..*|cache-.*\.arrow",
    re.IGNORECASE,
)
# A shard's number and the total in a file name: as the hub writes them, as a numbered part, or as a number at the end.
# The number of a version (v1.1) is no shard number.
SHARD_NUMBERS = (
    re.compile(r"[-_. ]?(\d+)[-_ ]of[-_ ](\d+)(?:-[0-9a-f]+)?$"),
    re.compile(r"[-_. ]?(?:part|shard|chunk)[-_. ]?(\d+)()(?!\d)"),
    re.compile(r"(?<![\d.])(?<![^a-z]v)[-_. ]?(\d+)()$"),
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class Row(NamedTuple):
    """One row as read; a dict if the file is well-formed."""

    place: str  # such as `train.jsonl, line 3`
    record: object


class _File(NamedTuple):
    path: Path
    name: str  # below the folder
    split: str | None  # None if the name has no split
    table: tuple  # equal for the shards of one table
    words: frozenset[str]  # of the name, without the split's
    number: int | None
    total: int | None


def read_rows(
    field: str, path: str | None, repository: str, config: str | None, splits: Sequence[str] | None = None
) -> dict[str, list[Row]]:
    """The rows of a data set, split by split.

    Parameters
    ----------
    field
        The setting that named the path, for messages.
    path
        A folder, a single file (the training split, under any name), or None for the hub.
    repository, config
        The data set's id on the hub, and the configuration to take, which can be a folder under `path`.
    splits
        The splits to read, of `train`, `validation`, `dev`, `test`; None reads all. Absent splits are left out.

    Raises
    ------
    InputError
        No data files, several candidates for one split, a missing shard, a file that is empty, broken or a Git LFS
        pointer, a broken link, an unreadable folder, or a hub that does not answer.
    """
    if path is None:
        return _hub_rows(field, repository, config, splits)
    try:
        root = Path(path).expanduser()
        there = bool(path.strip()) and root.exists()  # a blank path would be the working directory
        if there and root.is_dir():
            next(root.iterdir(), None)
        configured = config is not None and (root / config).is_dir()
    except (OSError, RuntimeError) as error:  # no permission, or `~user` of an unknown user
        raise InputError(f"{field} = {path!r}: it cannot be looked into ({error}); name another folder") from None
    if not there:
        raise InputError(f"{field}: there is no {path or repr(path)}; name the folder that holds {repository}'s files")
    if root.is_file():
        if splits is not None:
            raise InputError(f"{field}: {path} is one file; name the folder that holds {' and '.join(splits)}")
        if not root.name.lower().endswith(SUFFIXES):
            raise InputError(f"{field}: {path} is no {_kinds()} file")
        return {"train": _read(field, root, root.name)}
    if configured and data_files(root / config, _refuse(field)):
        root = root / config
    tables = _choose(field, path, root, repository, None if splits is None else tuple(splits), files_state(path))
    rows = {}
    for split, shards in tables.items():
        rows[split] = [row for shard in shards for row in _read(field, shard.path, shard.name)]
        if not rows[split]:
            raise InputError(f"{field}: {_names(shards)} of the {split} split is empty; fill it or take it away")
    return rows


def files_state(path: str | None) -> tuple:
    """A tuple that changes when a data file under `path` is written, added or removed; () for the hub."""
    if path is None or not path.strip():
        return ()
    try:
        root = Path(path).expanduser().absolute()
        # Unreadable places are ignored here, because reading them later raises.
        files = [root] if root.is_file() else data_files(root, lambda error: None)
        stats = [(str(file), file.stat()) for file in files]
    except (OSError, RuntimeError):
        return ()
    # ctime is needed because `cp -p` and `touch` can set mtime back.
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats)


def _kinds() -> str:
    return ".json, .jsonl, .parquet, .arrow, .csv or .tsv"


def data_files(root: Path, unreadable: Callable[[OSError], object]) -> list[Path]:
    """Data files below `root`, without hidden files (checkpoints, locks, resource forks) and notes about the data.

    Parameters
    ----------
    root
        A folder; linked folders inside are searched like others.
    unreadable
        Called with the error of each folder that cannot be listed and of each broken link. It may raise to end the
        search.
    """
    return sorted(
        path
        for path in _visible_files(root, unreadable)
        if path.name.lower().endswith(SUFFIXES) and not NO_DATA.fullmatch(path.name)
    )


def _visible_files(folder: Path, unreadable: Callable[[OSError], object], above: tuple[Path, ...] = ()) -> list[Path]:
    """Every file below `folder` that is not hidden. Links back to a folder of `above`, the parents, are skipped."""
    try:
        here = folder.resolve()
        paths = [] if here in above else list(folder.iterdir())
    except (OSError, RuntimeError) as error:
        unreadable(error if isinstance(error, OSError) else OSError(str(error)))
        return []
    files = []
    for path in paths:
        if path.name.startswith((".", "__", "~")) or NO_DATA.fullmatch(path.name):
            continue
        try:
            mode = path.stat().st_mode
        except OSError as error:
            unreadable(error)
            continue
        if S_ISDIR(mode):
            files += _visible_files(path, unreadable, (*above, here))
        elif S_ISREG(mode):
            files.append(path)
    return files


def _refuse(field: str) -> Callable[[OSError], object]:
    """A handler that refuses an unreadable place, because it may hold a held-out split."""

    def refuse(error: OSError) -> None:
        place = Path(error.filename or "")
        what = f"{place}, a link to {place.readlink()}," if place.is_symlink() else str(place)
        raise InputError(
            f"{field}: {what} cannot be read ({error.strerror or error}); mend it or its rights, or take it away"
        )

    return refuse


# --- which files belong to a split ---------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _choose(
    field: str, path: str, root: Path, repository: str, splits: tuple[str, ...] | None, state: tuple
) -> dict[str, list[_File]]:
    """The shards of each split in order. Cached, so that notes on unread files are printed once per `state`."""
    files = _each_once([_describe(file, root) for file in data_files(root, _refuse(field))], root)
    if unread := [path.name for path in sorted(root.iterdir()) if _looks_like_a_split(path)]:
        print(f"{field}: {', '.join(unread)} not read, since only {_kinds()} files are")
    if not files:
        raise InputError(f"{field}: {path} holds no {_kinds()} file; put {repository}'s files there")
    files_of = defaultdict(list)
    for file in files:
        files_of[file.split].append(file)
    unnamed = files_of.pop(None, [])
    if unnamed and "train" not in files_of:
        files_of["train"] = unnamed
    shards_of = {
        split: _plainest(field, split, _tables(files_of[split]))
        for split in files_of
        if splits is None or split in splits
    }
    read_files = [file for shards in shards_of.values() for file in shards]
    paths = {file.path for file in read_files}
    other_files = [file for file in files if file.path not in paths and (file.split in shards_of or file.split is None)]
    if other_files and read_files:
        print(f"{field}: {_names(read_files)} read, {_names(other_files)} left out")
    if len(files_of) > 1 and any(file.split is None for file in read_files):
        print(f"{field}: {_names(shards_of['train'])} read as the training split, of which no file has the name")
    for split, shards in shards_of.items():
        _check_complete(field, split, shards)
    return shards_of


def _each_once(files: list[_File], root: Path) -> list[_File]:
    """Drop files of a split that appear again in a linked folder, such as `default`, a link to `main`."""
    # A file under its own path comes before the same file under a link.
    in_order = sorted(
        files, key=lambda file: file.path.parent.resolve() != root.resolve() / file.path.parent.relative_to(root)
    )
    first = {}
    for file in in_order:
        first.setdefault((file.split, file.path.parent.resolve() / file.path.name), file)
    return sorted(first.values(), key=lambda file: file.path)


def _looks_like_a_split(path: Path) -> bool:
    """Whether a file is named like a split but has an unsupported format, such as test.xlsx or train.jsonl.zst."""
    name = path.name.lower()
    if (
        name.endswith(SUFFIXES)
        or name.startswith((".", "~", "#"))
        or name.endswith(("~", ".bak", ".swp", ".md", ".py"))
    ):
        return False
    return path.is_file() and re.split(r"[^a-z]", name)[0] in SPLIT_WORDS


def _describe(path: Path, root: Path) -> _File:
    relative = path.relative_to(root)
    name = relative.name.lower()
    suffix = max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len)
    stem, number, total = name.removesuffix(suffix), None, None
    for pattern in SHARD_NUMBERS:
        if match := pattern.search(stem):
            number, total = int(match[1]), int(match[2]) if match[2] else None
            stem = stem[: match.start()] + " " + stem[match.end() :]
            break
    # The split is in the file name, or else in the name of the nearest folder.
    levels = [re.findall(r"[^\W_]+", part.lower()) for part in (stem, *reversed(relative.parent.parts))]
    splits = [{SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS} for words in levels]
    split = next((names.pop() for names in splits if len(names) == 1), None)
    words = frozenset(word for words in levels for word in words if split is None or SPLIT_WORDS.get(word) != split)
    table = (relative.parent, tuple(levels[0]), suffix, total)
    return _File(path, str(relative), split, table, words, number, total)


def _tables(files: list[_File]) -> list[list[_File]]:
    """Group the shards of one table, ordered by number; every other file is a group of one."""
    alike = defaultdict(list)
    for file in files:
        alike[file.table].append(file)
    tables = []
    for shards in alike.values():
        numbers = sorted(-1 if shard.number is None else shard.number for shard in shards)
        if shards[0].total is not None or numbers in (list(range(len(shards))), list(range(1, len(shards) + 1))):
            tables.append(sorted(shards, key=lambda shard: shard.number))
        else:
            tables += [
                [shard if shard.number is None else shard._replace(words=shard.words | {str(shard.number)})]
                for shard in shards
            ]
    return tables


def _plainest(field: str, split: str, tables: list[list[_File]]) -> list[_File]:
    """The table whose words all other names contain: `train` among `train`, `train_socratic`, `train (copy)`."""
    words = [table[0].words for table in tables]
    plain = [table for table, own in zip(tables, words, strict=True) if all(own <= other for other in words)]
    if len(plain) != 1:
        names = _names([file for table in tables for file in table])
        raise InputError(
            f"{field}: {names}: any of them can be the {split} split; leave one there"
            + (", or name the file itself" if split == "train" else "")
        )
    return plain[0]


def _check_complete(field: str, split: str, shards: list[_File]) -> None:
    total = shards[0].total
    if total is None:
        return
    numbers = [shard.number for shard in shards]
    if numbers not in (list(range(total)), list(range(1, total + 1))):
        raise InputError(
            f"{field}: the {split} split is in {total} shards, but those there have the numbers "
            f"{', '.join(map(str, numbers))} ({_names(shards)}); fetch what is missing, remove what is there twice"
        )


def _names(files: list[_File]) -> str:
    names = ", ".join(file.name for file in files[:6])
    return names if len(files) <= 6 else f"{names}, … ({len(files)} files)"


# --- reading the files ---------------------------------------------------------------------------------------


def _read(field: str, path: Path, name: str) -> list[Row]:
    try:
        with path.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise InputError(f"{field}: {name} is a Git LFS pointer, not the file; run `git lfs pull` beside it")
        suffix = path.name.lower().removesuffix(".gz").rsplit(".", 1)[1]
        if suffix == "parquet":
            rows = _numbered(name, pyarrow.parquet.ParquetFile(path).read().to_pylist())
        elif suffix == "arrow":
            rows = _numbered(name, datasets.Dataset.from_file(str(path)).to_list())
        elif suffix in ("csv", "tsv"):
            rows = _csv_rows(name, _text(path), "," if suffix == "csv" else "\t")
        else:
            rows = _json_rows(name, _text(path))
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{field}: {name} is not in UTF-8 ({error}); save it as UTF-8") from None
    # Arrow's errors are OSErrors and ValueErrors.
    except (OSError, ValueError, ArithmeticError, RecursionError, EOFError, csv.Error, zlib.error) as error:
        raise InputError(f"{field}: {name} cannot be read: {error}; mend the file or fetch it again") from None
    # Parquet and Arrow tables in parts may have empty parts. An empty text file was cut off or never filled.
    if not rows and suffix not in ("parquet", "arrow"):
        raise InputError(f"{field}: {name} is empty; fill it or take it away")
    return rows


def _text(path: Path) -> str:
    content = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        content = gzip.decompress(content)
    return content.decode("utf-8-sig")


def _csv_rows(name: str, text: str, separator: str) -> list[Row]:
    """Rows whose values are all text, so that the answers `None` and `007` stay as written."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    # `line_num` is the line where a row ends.
    rows = [Row(f"{name}, line {reader.line_num}", record) for record in reader]
    for place, record in rows:
        if None in record:
            raise ValueError(f"{place} has more values than the first; put quotation marks around texts")
    return rows


def _json_rows(name: str, text: str) -> list[Row]:
    """One row per JSON value: the values follow each other, or are one list, which may be the `data` of an object."""
    values = list(_json_values(text))
    if len(values) == 1:
        [(_, value)] = values
        if isinstance(value, dict) and isinstance(value.get("data"), list):
            value = value["data"]
        if isinstance(value, list):
            return _numbered(name, value)
    return [Row(f"{name}, line {line}", value) for line, value in values]


def _json_values(text: str) -> Iterator[tuple[int, object]]:
    """Each JSON value with the line where it begins."""
    decoder = json.JSONDecoder()
    space = re.compile(r"\s*")
    position, line = 0, 1
    while True:
        begins = space.match(text, position).end()
        line += text.count("\n", position, begins)
        if begins == len(text):
            return
        try:
            value, position = decoder.raw_decode(text, begins)
        except json.JSONDecodeError as error:
            raise ValueError(f"what begins on line {line} is broken JSON ({error})") from None
        yield line, value
        line += text.count("\n", begins, position)


def _numbered(name: str, records: list) -> list[Row]:
    return [Row(f"{name}, row {number}", record) for number, record in enumerate(records, 1)]


def _hub_rows(field: str, repository: str, config: str | None, splits: Sequence[str] | None) -> dict[str, list[Row]]:
    try:
        tables = datasets.load_dataset(repository, config)
    # The hub's client raises exceptions of four libraries: offline, unknown, gated, interrupted.
    except Exception as error:
        raise InputError(
            f"{field}: {repository} cannot be had from the hub ({type(error).__name__}: {error}); connect, log in with "
            "`hf auth login` if it is gated, or put its files into a folder and name that as `path`"
        ) from None
    return {
        split: _numbered(f"{repository}, {split}", table.to_list())
        for split, table in tables.items()
        if splits is None or split in splits
    }


def folder_hashes(place: str | None) -> dict[str, str] | None:
    """The hash of each data file at `place`, a folder or a file; None if `place` is None, for the hub.

    Files that `data_files` does not list are left out. So are unreadable files, because reading them later raises.
    """
    if place is None:
        return None
    root = Path(place).expanduser()
    if root.is_file():
        return {root.name: file_hash(root)}
    return {str(path.relative_to(root)): file_hash(path) for path in data_files(root, lambda error: None)}
