"""`make publish PROFILE=…`: promote a run's records to results/, where figures and README take them from."""

import shutil
import sys

from lorapar_utils.errors import InputError
from lorapar_utils.records import Record, read_records
from lorapar_utils.settings import load_profile, project_root


def publish(profile: str) -> int:
    """Copy every record of `runs/<profile>/records` to `results/<profile>`; returns how many.

    Raises
    ------
    InputError
        A profile that is not publishable, no records, or records made from uncommitted code.
    """
    settings = load_profile(profile)
    if not settings.publishable:
        raise InputError(f"profile {profile!r} is not publishable: its numbers test the pipeline and mean nothing")
    source = settings.runs / "records"
    records = read_records(source)
    if not records:
        raise InputError(f"{source}: no records; run `make book PROFILE={profile}` first")
    for record in records.values():
        _check(record)
    target = project_root() / "results" / settings.profile
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.json*")):
        shutil.copy(path, target / path.name)
    return len(records)


def _check(record: Record) -> None:
    if not record.run["publishable"]:
        raise InputError(f"record {record.name}: made by a profile that is not publishable")
    if record.run["dirty"] is not False:
        raise InputError(f"record {record.name}: made from uncommitted changes; commit them and run it again")


if __name__ == "__main__":
    try:
        print(f"published {publish(sys.argv[1] if len(sys.argv) > 1 else 'cpu')} records")
    except InputError as error:
        sys.exit(str(error))
