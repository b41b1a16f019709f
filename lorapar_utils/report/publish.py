"""`make publish PROFILE=…`: copy a run's records to results/, which figures and README show; of `study`, adapters."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

from lorapar_utils.cache import MANIFEST, completed, write_atomically
from lorapar_utils.errors import InputError
from lorapar_utils.models.published import HOME, TRAINED_BY
from lorapar_utils.records import Record, read_record, read_records, study, write_record
from lorapar_utils.report import tables
from lorapar_utils.report.book import to_markdown
from lorapar_utils.settings import Settings, load_profile, project_root

# The experiments whose adapters are published, and where their base is to be had.
PUBLISHED = ("lorapar", "lora_rl")
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


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
    for path in sorted(source.glob("[!.]*.json*")):  # not what a killed process left half written
        shutil.copy(path, target / path.name)
    ours = settings.runs / "experiments" / "lorapar-seed0"
    if (ours / "stage1" / "partition").is_dir():
        shutil.copytree(ours / "stage1" / "partition", target / "partition", dirs_exist_ok=True)
    if settings.profile == HOME.parent.name:
        publish_adapters(settings)
    readme = project_root() / "README.md"
    if readme.is_file():
        write_atomically(readme, readme_with_results(readme.read_text(encoding="utf-8"), study().values()))
    return len(records)


def publish_adapters(settings: Settings) -> None:
    """Copy the adapters of `PUBLISHED` at the first seed, after each stage, with partition and record.

    What they were trained on goes beside them. Nothing is copied before both are trained.
    """
    runs = {name: f"{name}-seed{settings.seeds[0]}" for name in PUBLISHED}
    stages = {name: sorted((settings.runs / "experiments" / run).glob("stage*")) for name, run in runs.items()}
    if not all(stages.values()):
        return
    asked = settings.evaluation.model_dump(include={"max_new_tokens", "batch_size"})
    told = {"extends": "laptop", "pool": settings.pool.model_dump(), "evaluation": asked}
    comment = "# The settings that the published adapters were trained under, as far as asking them again needs them.\n"
    write_atomically(project_root() / TRAINED_BY, comment + yaml.safe_dump(told, sort_keys=False))
    for name, run in runs.items():
        stage = stages[name][-1].resolve()
        manifest = json.loads((stage / MANIFEST).read_text(encoding="utf-8"))
        target = project_root() / HOME / name
        shutil.rmtree(target, ignore_errors=True)
        with completed(target, manifest["inputs"], manifest["origin"]) as scratch:
            _copy_adapter(stage / "adapter", scratch)
            if len(stages[name]) > 1:
                _copy_adapter(stages[name][0] / "adapter", scratch / "stage1")
            if (stage / "partition").is_dir():
                shutil.copytree(stage / "partition", scratch / "partition")
            write_record(read_record(settings.runs / "records" / f"{run}.json"), scratch / "record.json")


def _copy_adapter(adapter: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    shutil.copy(adapter / "adapter_model.safetensors", target)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    # In the place of a folder of this machine.
    config["base_model_name_or_path"] = BASE
    write_atomically(target / "adapter_config.json", json.dumps(config, indent=1))


def readme_with_results(readme: str, records: Iterable[Record]) -> str:
    """`readme` with the block between its `results` marks filled from the study's records."""
    records = list(records)
    made = [table(records) for table in (tables.arms_table, tables.reinforced_table)]
    shown = [frame[[column for column in frame if column != "records" and "each seed" not in column]] for frame in made]
    parts = [to_markdown(frame) for frame in shown if not frame.empty]
    block = "\n\n".join(["<!-- results:begin -->", *parts, "<!-- results:end -->"])
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
        print(f"published {publish(sys.argv[1] if len(sys.argv) > 1 else 'laptop')} records")
    except InputError as error:
        sys.exit(str(error))
