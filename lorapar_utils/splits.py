"""The voting phase: which training examples are System 1 (D1), which System 2 (D2) (paper, section 3.1).

`python -m lorapar_utils.splits PROFILE` asks the profile's teachers; with `--dry-run` it prints calls, tokens and cost
instead.
"""

import argparse
import os
import random
import sqlite3
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import diskcache
import numpy as np
import pandas as pd

from lorapar_utils import data, records, teachers, voting
from lorapar_utils.errors import InputError
from lorapar_utils.machine import lock
from lorapar_utils.manifests import completed, inputs_of, is_current, made_from
from lorapar_utils.settings import Settings, load_profile, project_root


def votes(settings: Settings, *, retry: bool = False) -> datasets.Dataset:
    """The training split with every teacher's vote (see `voting.vote`), decided by the panel `voting.panel`.

    With `retry`, questions whose calls failed last time are asked again. Without, they stay abstentions, so that all
    later phases see the same split.
    """
    folder = settings.runs / "votes"
    inputs = _voting_inputs(settings)
    file = folder / "votes.parquet"
    if is_current(folder, inputs):
        voted = datasets.Dataset.from_parquet(str(file))
        if not (retry and any(voted["failed"])):
            return _decided(voted, settings)
    with _vote_cache() as cache:
        pool, teachers = _electorate(settings)
        voted = voting.vote(pool, teachers, cache, calibration=settings.voting.calibration)
        # Processes that waited for the same answers continue at the same time, so only one may write.
        with lock(Path(cache.directory) / "writing.lock"):
            if retry or made_from(folder) != inputs:
                with completed(folder, inputs) as scratch:
                    voted.to_parquet(scratch / "votes.parquet")
    if failed := sum(voted["failed"]):
        print(f"{failed} calls failed and count as abstentions; run this phase again to repeat them")
    return _decided(voted, settings)


def voting_plan(settings: Settings) -> pd.DataFrame:
    """Calls, tokens and cost of `votes` by teacher; see `voting.plan`."""
    with _vote_cache() as cache:
        return voting.plan(*_electorate(settings), cache)


def _decided(voted: datasets.Dataset, settings: Settings) -> datasets.Dataset:
    """`voted` with `system` and `agreement` decided by the members of `voting.panel`."""
    names = [teacher.name for teacher in settings.voting.teachers]
    columns = [names.index(name) for name in settings.voting.members()]
    table = np.array(voted["votes"])[:, columns]
    system, agreement = voting.decide(table, quorum=settings.voting.quorum, tie=settings.voting.tie)
    decisions = {"system": system.tolist(), "agreement": agreement.tolist()}
    return datasets.Dataset.from_dict(voted.to_dict() | decisions)


def system_examples(settings: Settings, system: int) -> list[dict]:
    """D1 or D2: the training examples that `voting.split_by` puts into `system`.

    Raises
    ------
    InputError
        The system is empty.
    """
    by = settings.voting.split_by
    # Construction labels need no teacher.
    rows = list(_training_split(settings) if by == "construction" else votes(settings))
    systems = [data.construction_system(row["steps"]) if by == "construction" else row["system"] for row in rows]
    if by == "random":
        random.Random(settings.seed).shuffle(systems)
    examples = [row for row, row_system in zip(rows, systems, strict=True) if row_system == system]
    if not examples:
        raise InputError(
            f"voting: no training example belongs to System {system} by {settings.split_name}; "
            "change voting.calibration, voting.teachers or voting.split_by"
        )
    return examples


@contextmanager
def _vote_cache() -> Iterator[diskcache.Cache]:
    """The cache of paid answers, shared by all profiles of a clone, or by all clones with the same `LORAPAR_VOTES`.

    SQLite's write-ahead log is off, because on a network file system it loses the writes of two machines. On a file
    system without locks an InputError is raised before any question, because the answers could not be options.
    """
    folder = project_root() / Path(os.environ.get("LORAPAR_VOTES") or "runs/vote_cache").expanduser()
    options = {"disk": diskcache.JSONDisk, "eviction_policy": "none", "sqlite_journal_mode": "delete"}
    try:
        with diskcache.Cache(folder, **options) as cache:
            yield cache
    except (sqlite3.OperationalError, diskcache.Timeout) as error:
        raise InputError(
            f"votes: {folder} cannot keep them ({str(error) or 'it stayed locked'}). They need space and a file system "
            "with locks, which some network folders lack: move that folder to a disk that has them, and set "
            "LORAPAR_VOTES to where it is"
        ) from error
    except (sqlite3.DatabaseError, zlib.error) as error:
        raise InputError(
            f"votes: {folder} is damaged ({error}); the answers in it are lost: move that folder away, and run again "
            "to ask for them anew"
        ) from error


def _training_split(settings: Settings) -> datasets.Dataset:
    return data.load_pool(settings).filter(lambda row: row["split"] == "train")


def _electorate(settings: Settings) -> tuple[datasets.Dataset, list[voting.Teacher]]:
    pool = _training_split(settings)
    return pool, teachers.build_teachers(settings, list(pool))


def _voting_inputs(settings: Settings) -> dict:
    section_inputs = settings.voting.model_dump(include={"calibration", "role_play_template", "plain_template"})
    # Names are columns of the votes, and token limits decide which answers are cut off; both change the written file.
    section_inputs["teachers"] = [
        teachers.identity(section, settings) | section.model_dump(include={"name", "max_tokens"})
        for section in settings.voting.teachers
    ]
    modules = ("voting", "teachers", "label_scores", "models")
    rows = [[row[key] for key in data.COLUMNS] for row in _training_split(settings)]
    return inputs_of(settings, modules, examples=records.fingerprint(rows), voting=section_inputs)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lorapar_utils.splits", description="Ask a profile's teachers.")
    parser.add_argument("profile")
    parser.add_argument("--dry-run", action="store_true", help="print calls, tokens and cost; ask nothing")
    options = parser.parse_args(arguments)
    try:
        settings = load_profile(options.profile)
        if options.dry_run:
            print(voting_plan(settings).to_string(index=False))
        else:
            counts = pd.Series(votes(settings, retry=True)["system"]).value_counts()
            print(", ".join(f"System {system or 'undecided'}: {count}" for system, count in counts.items()))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
