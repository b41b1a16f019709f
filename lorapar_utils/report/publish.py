"""`make publish PROFILE=…`: copy a run's records to results/, the source of figures and README."""

import re
import shlex
import shutil
import sys

from lorapar_utils.cache import write_atomically
from lorapar_utils.errors import InputError
from lorapar_utils.records import Record, read_records
from lorapar_utils.records.intervals import Metric
from lorapar_utils.report import tables
from lorapar_utils.settings import load_profile, project_root


def publish(profile: str) -> int:
    """Copy every record of `runs/<profile>/records` to `results/<profile>`, and return how many.

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
        raise InputError(f"{source}: no records; run `make book PROFILE={shlex.quote(profile)}` first")
    for record in records.values():
        _check(record)
    target = project_root() / "results" / settings.profile
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.json*")):
        shutil.copy(path, target / path.name)
    readme = project_root() / "README.md"
    if settings.profile == "cpu" and readme.is_file():
        write_atomically(readme, readme_with_results(readme.read_text(encoding="utf-8"), records))
    return len(records)


def readme_with_results(readme: str, records: dict[str, Record]) -> str:
    """`readme` with the block between its `results` marks filled from `records`."""

    def cell(record: str, metric: str) -> str:
        return tables.written(records[record].metrics.get(metric) if record in records else None)

    rows = [
        ("base model", "base-seed0", "base"),
        ("LoRA-PAR, after stage 1 (SFT)", "lorapar-seed0", "stage1"),
        ("LoRA-PAR, after stage 2 (GRPO)", "lorapar-seed0", "stage2"),
        ("LoRA, all elements, after stage 1", "lora_rl-seed0", "stage1"),
        ("LoRA, all elements, after stage 2", "lora_rl-seed0", "stage2"),
    ]
    lines = ["| test accuracy, 95 % interval | System 1 | System 2 | elements active |", "| --- | --- | --- | --- |"]
    for title, record, stage in rows:
        active = records[record].metrics.get(f"active/{stage}") if record in records else None
        share = tables.written(active, Metric.share, "–")
        lines.append(f"| {title} | {cell(record, f'{stage}/system1')} | {cell(record, f'{stage}/system2')} | {share} |")
    block = "<!-- results:begin -->\n" + "\n".join(lines) + "\n<!-- results:end -->"
    return re.sub(r"<!-- results:begin -->.*<!-- results:end -->", lambda _: block, readme, flags=re.S)


def _check(record: Record) -> None:
    if not record.run["publishable"]:
        raise InputError(f"record {record.name}: made by a profile that is not publishable")
    if record.run["dirty"] is None:
        raise InputError(
            f"record {record.name}: made without git, so that no commit tells its code; "
            "install git, run it again in a clone, and publish that"
        )
    if record.run["dirty"]:
        raise InputError(f"record {record.name}: made from uncommitted changes; commit them and run it again")


if __name__ == "__main__":
    try:
        print(f"published {publish(sys.argv[1] if len(sys.argv) > 1 else 'cpu')} records")
    except InputError as error:
        sys.exit(str(error))
