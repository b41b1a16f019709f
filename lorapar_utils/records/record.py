"""Result records: every number and figure of the book comes from one of these JSON files.

A record has three blocks: `run` (settings and origin), `result` (metrics and tables), `environment` (versions and
hardware). A metric is `{"value", "n", "low", "high"}` with a 95 % interval. A quantity that was not measured is absent.
Per-item outcomes lie beside the record in `NAME.items.jsonl`.
"""

import json
import shlex
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lorapar_utils.cache import PACKAGE, code_of, write_atomically
from lorapar_utils.cache import origin as new_origin
from lorapar_utils.errors import InputError
from lorapar_utils.machine import compute_dtype
from lorapar_utils.records.intervals import Metric
from lorapar_utils.settings import Settings, project_root


@dataclass(frozen=True)
class Record:
    """One result with its provenance; see the module docstring for the blocks."""

    run: dict
    result: dict
    environment: dict
    items: list[dict] = field(default_factory=list, compare=False)

    @property
    def name(self) -> str:
        return self.run["name"]

    @property
    def experiment(self) -> str:
        """Its name without the seed."""
        return self.name.rsplit("-seed", 1)[0]

    @property
    def metrics(self) -> dict[str, Metric]:
        """Every metric by name; a quantity that was not measured is absent."""
        return {key: Metric(**values) for key, values in self.result["metrics"].items()}

    def metric(self, key: str) -> Metric:
        """The metric `key`, or an InputError that lists the record's metrics."""
        metrics = self.metrics
        if key not in metrics:
            raise InputError(f"record {self.name}: no metric {key!r}; it has {', '.join(metrics)}")
        return metrics[key]


def new_record(
    name: str,
    settings: Settings,
    *,
    metrics: dict[str, Metric],
    tables: dict[str, list[dict]] | None = None,
    items: Iterable[dict] = (),
    parameters: dict | None = None,
    notebook: str | None = None,
    seconds: float | None = None,
    hashes: dict[str, str] | None = None,
    origin: dict | None = None,
) -> Record:
    """Assemble a record of a run under `settings`.

    Parameters
    ----------
    metrics
        By name; see `intervals`.
    tables
        Name -> rows, for figures and tables.
    notebook
        The notebook that makes this record, with extra papermill parameters; gives `run.command`.
    seconds
        Duration of the run; None if the result was read from disk.
    hashes
        Of the inputs, such as {"model": …, "data": …}.
    origin
        When, from which commit and where the result was made (see `cache.origin`); None for now and here.
    """
    origin = origin or new_origin()
    return Record(
        run={
            "name": name,
            "profile": settings.profile,
            "publishable": settings.publishable,
            "parameters": parameters or {},
            "seed": settings.seed,
            "command": command(settings, notebook) if notebook else None,
            "created": origin["created"],
            "seconds": None if seconds is None else round(seconds, 1),
            "commit": origin["commit"],
            "dirty": origin["dirty"],
            "error": None,
        },
        result={"metrics": {key: metric.as_json() for key, metric in metrics.items()}, "tables": tables or {}},
        environment={
            "python": origin["python"],
            "packages": origin["packages"],
            "hardware": origin["hardware"] | {"threads": settings.threads},
            "dtype": _dtype(settings),
            "hashes": {"scorer": code_of(PACKAGE / "data" / "answers.py"), **(hashes or {})},
        },
        items=list(items),
    )


def _dtype(settings: Settings) -> str | None:
    """The dtype of the model here, such as `bfloat16`; None in a process that has loaded none."""
    if "torch" not in sys.modules:
        return None
    return compute_dtype(settings.model.dtype)


def write_record(record: Record, path: Path) -> Path:
    """Write `record`, and the items beside it; a reader never sees half a file, and an equal file is left as it is."""
    content = {key: value for key, value in asdict(record).items() if key != "items"}
    _write_if_changed(_items_path(path), "".join(json.dumps(item) + "\n" for item in record.items))
    _write_if_changed(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def _write_if_changed(path: Path, text: str) -> None:
    """Write `text`, none for an empty one, unless it is there: a build takes a file that was written for a new one."""
    if not text:
        path.unlink(missing_ok=True)
    elif not path.is_file() or path.read_bytes() != text.encode():
        write_atomically(path, text)


def read_record(path: Path) -> Record:
    """The record in `path`, with items."""
    items = _items_path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lines = items.read_text(encoding="utf-8").splitlines() if items.is_file() else []
        return Record(**content | {"items": [json.loads(line) for line in lines]})
    except FileNotFoundError:
        raise InputError(f"record {path}: not there; run the notebook that makes it") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise InputError(f"record {path}: not a record ({error}); delete it and run its notebook again") from None


def read_records(folder: Path) -> dict[str, Record]:
    """Every record of a folder by name, in name order."""
    return {record.name: record for record in map(read_record, sorted(folder.glob("[!.]*.json")))}


def claim_runs(settings: Settings) -> None:
    """Note the profile's file in `runs/<profile>/`, so that two profiles of one name never share the folder.

    Raises
    ------
    InputError
        The folder belongs to another profile file.
    """
    root, note = project_root(), settings.runs / "profile.txt"
    owner = note.read_text(encoding="utf-8").strip() if note.is_file() else None
    if owner == settings.profile_file:
        return
    if owner is not None:
        if (root / Path(owner).expanduser()).is_file():
            raise InputError(
                f"profile: runs/{settings.profile} was made from {owner}, and this is {settings.profile_file}: "
                f"rename one of the files, or delete runs/{settings.profile}"
            )
        print(f"runs/{settings.profile} was made from {owner}, which is gone; {settings.profile_file} goes on with it")
    # In a folder that cannot be written, no runs get mixed up.
    with suppress(OSError):
        write_atomically(note, f"{settings.profile_file}\n")


def _items_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.items.jsonl")


def command(settings: Settings, notebook: str) -> str:
    """A shell command that runs `notebook` (a notebook and extra papermill parameters) over the profile."""
    return f"papermill notebooks/{notebook} -p profile {shell_word(settings)}"


def shell_word(settings: Settings) -> str:
    """The profile's name or path, quoted for a shell, which expands `~` only where it is not quoted."""
    home, slash, rest = settings.profile_argument.partition("~/")
    return f"~/{shlex.quote(rest)}" if slash and not home else shlex.quote(settings.profile_argument)
