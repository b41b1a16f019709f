"""The voting phase: which training examples are System 1 (D1), which System 2 (D2) (paper, section 3.1).

`python -m lorapar_utils.voting.split PROFILE` asks the profile's teachers; with `--dry-run` it prints questions,
tokens, cost and a prompt instead.
"""

import argparse
import os
import random
import shutil
import sqlite3
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import diskcache
import numpy as np
import pandas as pd

from lorapar_utils import data, voting
from lorapar_utils.cache import code_of, completed, fingerprint, is_whole, origin
from lorapar_utils.errors import InputError
from lorapar_utils.machine import lock
from lorapar_utils.models.identity import model_identity
from lorapar_utils.settings import Settings, load_profile, working_root
from lorapar_utils.voting import teachers

DECISIONS = {1: "System 1", 2: "System 2", 0: "undecided and left out"}


def votes(settings: Settings, *, pool: datasets.Dataset | None = None, retry: bool = False) -> datasets.Dataset:
    """The training split with every teacher's vote (see `voting.vote`), decided by the panel `voting.panel`.

    With `retry`, questions whose calls failed last time are asked again. Without, they stay abstentions, so that all
    later phases see the same split.
    """
    questions = _training_rows(settings, pool)
    inputs = _inputs(settings, questions)
    folder = votes_folder(settings, questions)
    file = folder / "votes.parquet"
    if is_whole(folder):
        voted = datasets.Dataset.from_parquet(str(file))
        if not (retry and any(voted["failed"])):
            return _decided(voted, settings)
    begun = origin()
    with _vote_cache() as cache:
        electorate = teachers.build_teachers(settings, list(questions))
        voted = voting.vote(questions, electorate, cache, calibration=settings.voting.calibration)
        # Processes that waited for the same answers continue at the same time, so only one may write.
        with lock(Path(cache.directory) / "writing.lock"):
            if retry:
                shutil.rmtree(folder, ignore_errors=True)
            with completed(folder, inputs, begun) as scratch:
                voted.to_parquet(scratch / "votes.parquet")
    if failed := sum(voted["failed"]):
        print(f"{failed} calls failed and count as abstentions; run this phase again to repeat them")
    return _decided(voted, settings)


def votes_folder(settings: Settings, pool: datasets.Dataset | None = None) -> Path:
    """Where these votes are, or will be."""
    return settings.runs / "votes" / fingerprint(_inputs(settings, _training_rows(settings, pool)))


def voting_plan(settings: Settings) -> pd.DataFrame:
    """Questions, tokens and cost of `votes` by teacher; see `voting.plan`."""
    questions = _training_rows(settings, None)
    with _vote_cache() as cache:
        return voting.plan(questions, teachers.build_teachers(settings, list(questions)), cache)


def first_prompt(settings: Settings, names: Sequence[str] = ()) -> str:
    """What the first teacher of `names`, else of all that are asked, would be asked about the first example."""
    questions = list(_training_rows(settings, None))
    asked = [teacher for teacher in teachers.build_teachers(settings, questions) if teacher.key]
    if not asked:
        return "every vote is read from a file"
    teacher = next((teacher for teacher in asked if teacher.name in names), asked[0])
    return f"{teacher.name}: {teacher.prompt(questions[0])}"


def _decided(voted: datasets.Dataset, settings: Settings) -> datasets.Dataset:
    """`voted` with `system` and `agreement` decided by the members of `voting.panel`."""
    names = [teacher.name for teacher in settings.voting.teachers]
    columns = [names.index(name) for name in settings.voting.members()]
    table = np.array(voted["votes"])[:, columns]
    system, agreement = voting.decide(table, quorum=settings.voting.quorum, tie=settings.voting.tie)
    decisions = {"system": system.tolist(), "agreement": agreement.tolist()}
    return datasets.Dataset.from_dict(voted.to_dict() | decisions)


def systems(settings: Settings, pool: datasets.Dataset | None = None) -> dict[int, list[dict]]:
    """D1 and D2 by system: the training examples that `voting.split_by` puts into each.

    Raises
    ------
    InputError
        A system is empty.
    """
    by = settings.voting.split_by
    # Construction labels need no teacher.
    rows = list(_training_rows(settings, pool) if by == "construction" else votes(settings, pool=pool))
    labels = [row["construction"] if by == "construction" else row["system"] for row in rows]
    if by == "random":
        random.Random(settings.seed).shuffle(labels)
    if count := round(settings.voting.flipped * len(labels)):
        for i in random.Random(settings.seed).sample(range(len(labels)), count):
            labels[i] = {1: 2, 2: 1}.get(labels[i], labels[i])
    by_system = {k: [row for row, label in zip(rows, labels, strict=True) if label == k] for k in (1, 2)}
    if empty := [k for k, examples in by_system.items() if not examples]:
        raise InputError(
            f"voting: no training example belongs to System {empty[0]} by {settings.split_name}; "
            "change voting.calibration, voting.teachers or voting.split_by"
        )
    return by_system


@contextmanager
def _vote_cache() -> Iterator[diskcache.Cache]:
    """The cache of paid answers, shared by all profiles of a clone, or by all clones with the same `LORAPAR_VOTES`.

    SQLite's write-ahead log is off, because on a network file system it loses the writes of two machines. On a file
    system without locks an InputError is raised before any question, because the answers could not be kept.
    """
    folder = working_root() / Path(os.environ.get("LORAPAR_VOTES") or "runs/vote_cache").expanduser()
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


def _training_rows(settings: Settings, pool: datasets.Dataset | None) -> datasets.Dataset:
    return (data.load_pool(settings) if pool is None else pool).filter(lambda row: row["split"] == "train")


def _inputs(settings: Settings, questions: datasets.Dataset) -> dict:
    asked = settings.voting.model_dump(include={"calibration", "role_play_template", "plain_template"})
    # Names are columns of the votes, and token limits decide which answers are cut off; both change the written file.
    asked["teachers"] = [
        teachers.identity(section, settings) | section.model_dump(include={"name", "max_tokens"})
        for section in settings.voting.teachers
    ]
    return {
        "code": code_of(__file__),
        "model": model_identity(settings),
        "examples": fingerprint([[row[key] for key in data.COLUMNS] for row in questions]),
        "voting": asked,
        "speed": settings.shortcuts,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lorapar_utils.voting.split", description="Ask a profile's teachers."
    )
    parser.add_argument("profile")
    parser.add_argument(
        "--dry-run", action="store_true", help="print questions, tokens, cost and a prompt; ask nothing"
    )
    options = parser.parse_args(arguments)
    try:
        settings = load_profile(options.profile)
        if options.dry_run:
            unset = {t.key_to_set() for t in settings.voting.teachers if t.kind == "api"} - {None}
            os.environ |= dict.fromkeys(unset, "none: nothing is asked")
            costs = voting_plan(settings)
            to_ask = costs.loc[costs["to ask"] > 0, "teacher"].tolist()
            print(costs.to_string(index=False), first_prompt(settings, to_ask), sep="\n\n")
            if unset:
                print(f"\nnot set yet: {', '.join(sorted(unset))}; put the servers' keys there before you ask")
        else:
            counts = pd.Series(votes(settings, retry=True)["system"]).value_counts()
            print(", ".join(f"{DECISIONS[system]}: {count}" for system, count in counts.items()))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
