"""Result records: every number and figure of the book comes from one of these JSON files.

A record has three blocks: `run` (settings and origin), `result` (metrics and tables), `environment` (versions and
hardware). A metric is `{"value", "n", "low", "high"}` with a 95 % interval. A quantity that was not measured is absent.
Per-item outcomes lie beside the record in `NAME.items.jsonl`.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from lorapar_utils.errors import InputError
from lorapar_utils.settings import Settings, project_root
from lorapar_utils.statistics import Metric

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "reasoning-gym", "numpy", "pandas")


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
) -> Record:
    """Assemble a record of a run under `settings`.

    Parameters
    ----------
    metrics
        By name; see `statistics`.
    tables
        Name -> rows, for figures and tables.
    notebook
        The notebook that makes this record, with extra papermill parameters; gives `run.command`.
    seconds
        Duration of the run; None if the result was read from disk.
    hashes
        Of the inputs, such as {"model": …, "data": …}.
    """
    git = _git_state()
    return Record(
        run={
            "name": name,
            "profile": settings.profile,
            "publishable": settings.publishable,
            "parameters": parameters or {},
            "seed": settings.seed,
            "command": command(settings, notebook) if notebook else None,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": None if seconds is None else round(seconds, 1),
            **git,
            "error": None,
        },
        result={"metrics": {key: metric.as_json() for key, metric in metrics.items()}, "tables": tables or {}},
        environment={
            "python": platform.python_version(),
            "packages": {p: importlib.metadata.version(p) for p in PACKAGES},
            "hardware": _hardware(settings),
            "hashes": {"scorer": _scorer_hash(), **(hashes or {})},
        },
        items=list(items),
    )


def write_record(record: Record, path: Path) -> Path:
    """Write `record`, and the items beside it; a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if record.items:
        write_atomically(_items_path(path), "".join(json.dumps(item) + "\n" for item in record.items))
    content = {key: value for key, value in asdict(record).items() if key != "items"}
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def read_record(path: Path) -> Record:
    """The record in `path`, with items."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        record = Record(**content)
    except FileNotFoundError:
        raise InputError(f"record {path}: not there; run the notebook that makes it") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise InputError(f"record {path}: not a record ({error}); delete it and run its notebook again") from None
    items = _items_path(path)
    lines = items.read_text(encoding="utf-8").splitlines() if items.is_file() else []
    return replace(record, items=[json.loads(line) for line in lines])


def read_records(folder: Path) -> dict[str, Record]:
    """Every record of a folder by name, in name order."""
    return {record.name: record for record in map(read_record, sorted(folder.glob("*.json")))}


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


def cite(name: str, found: Sequence[Record], link: Callable[[Record], str] | None) -> str:
    """An experiment with its seeds, or "(no record)"; HTML if `link`, which gives a record's address, is not None."""
    if not found:
        return f"{name} (no record)"

    def entry(text: str, record: Record) -> str:
        run = record.run
        title = (
            f"{record.name} of profile {run['profile']}, commit {(run['commit'] or 'none')[:10]}, made {run['created']}"
        )
        return text if link is None else f'<a class="result" href="{link(record)}" title="{title}">{text}</a>'

    if len(found) == 1 and found[0].name == name.rpartition("/")[2]:
        return entry(name, found[0])
    seeds = ", ".join(entry(f"seed {record.run['seed']}", record) for record in found)
    return f"{name} ({seeds})"


def beside_notebooks(record: Record, settings: Settings) -> str:
    """Path of `record` from `notebooks/`: in the runs of `settings.profile`, or among the published records."""
    profile, name = record.run["profile"], f"{record.name}.json"
    published = (project_root() / "results" / profile / name).is_file()
    own = profile == settings.profile and ((settings.runs / "records" / name).is_file() or not published)
    return f"../runs/{profile}/records/{name}" if own else f"../results/{profile}/{name}"


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


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def fingerprint(content: object) -> str:
    """A short hash of anything JSON can hold: equal content, equal fingerprint."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _items_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.items.jsonl")


def command(settings: Settings, notebook: str) -> str:
    """A shell command that runs `notebook` (a notebook and extra papermill parameters) over the profile."""
    home, slash, rest = settings.profile_argument.partition("~/")
    # The shell expands `~` only where it is not quoted.
    profile = f"~/{shlex.quote(rest)}" if slash and not home else shlex.quote(settings.profile_argument)
    return f"papermill notebooks/{notebook} -p profile {profile}"


def _git_state() -> dict:
    """The commit, and whether tracked files differ from it; both None without git or outside a clone."""

    def git(*arguments: str) -> str | None:
        try:
            process = subprocess.run(["git", *arguments], cwd=project_root(), capture_output=True, text=True)
        except OSError:
            return None
        return process.stdout.strip() if process.returncode == 0 else None

    # An unpacked archive may lie inside the repository of another project.
    if not git("ls-files", "profiles/defaults.yaml"):
        return {"commit": None, "dirty": None}
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def _hardware(settings: Settings) -> dict:
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
        cpu = models[0] if models else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": settings.threads, "gpu": gpu}


def _scorer_hash() -> str:
    files = [Path(__file__).parent / f"{name}.py" for name in ("rewards", "answers", "constants", "units")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
