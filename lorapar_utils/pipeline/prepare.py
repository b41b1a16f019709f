"""What every experiment rests on: the votes and the importance scores, with their records.

`python -m lorapar_utils.pipeline.prepare PROFILE` is the first job of `make book`; the pages read what it leaves.
"""

import argparse
import os

from lorapar_utils.cache import origin_of
from lorapar_utils.errors import told_on_the_command_line
from lorapar_utils.pipeline.examples import Examples
from lorapar_utils.pipeline.scores import partition, scores, scores_folder, stability, stability_folder
from lorapar_utils.records import Record, write_record
from lorapar_utils.records.from_scores import importance_record, stability_record
from lorapar_utils.records.from_votes import voting_record
from lorapar_utils.settings import Settings, load_profile
from lorapar_utils.voting import split


def record_votes(settings: Settings, examples: Examples, *, retry: bool = False) -> Record:
    """Cast the votes or read them back, and write record `voting`. `retry`: see `voting.split.votes`."""
    voted = split.votes(settings, pool=examples.pool, retry=retry)
    record = voting_record(voted, settings, origin_of(split.votes_folder(settings, examples.pool)))
    write_record(record, settings.runs / "records" / "voting.json")
    return record


def record_scores(settings: Settings, examples: Examples, explored: dict | None = None) -> list[Record]:
    """Score every element or read the scores back, and write record `importance`, and `stability` where asked for.

    Parameters
    ----------
    explored
        Settings that differ from the profile's, by their short names. Their record has them in its name and command,
        and lies in `runs/<profile>/explored/`, apart from the records that the book is made of.
    """
    systems = examples.systems
    both = scores(settings, systems)
    origin = origin_of(scores_folder(settings, systems))
    records = [importance_record(both, partition(settings, both), settings, origin, explored)]
    if explored:
        path = write_record(records[0], settings.runs / "explored" / f"{records[0].name}.json")
        print(f"explored: {os.path.relpath(path)}")
        return records
    if rows := stability(settings, systems):
        records.append(stability_record(rows, settings, origin_of(stability_folder(settings, systems))))
    for record in records:
        write_record(record, settings.runs / "records" / f"{record.name}.json")
    return records


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lorapar_utils.pipeline.prepare", description=__doc__)
    parser.add_argument("profile")
    with told_on_the_command_line():
        settings = load_profile(parser.parse_args(arguments).profile)
        examples = Examples(settings)
        if settings.voting.teachers:
            record_votes(settings, examples, retry=True)
        record_scores(settings, examples)


if __name__ == "__main__":
    main()
