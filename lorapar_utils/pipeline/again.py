"""What was published, once more on this machine: the adapters' answers, and which elements the scores select."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from peft import PeftModel

from lorapar_utils import data, evaluation, models
from lorapar_utils.cache import completed, file_hash, fingerprint, is_whole, origin, origin_of, write_atomically
from lorapar_utils.errors import told_on_the_command_line
from lorapar_utils.models.published import TRAINED_BY, published_adapters, published_items
from lorapar_utils.partition import Partition
from lorapar_utils.pipeline.examples import Examples
from lorapar_utils.pipeline.inputs import common_inputs
from lorapar_utils.pipeline.scores import partition, scores
from lorapar_utils.records import Record, intervals, new_record, write_record
from lorapar_utils.records.intervals import Metric
from lorapar_utils.settings import Settings, load_profile, project_root


def record_again(settings: Settings, examples: Examples) -> Record:
    """Ask the published adapters again, compare this run's partition with the published one, write record `again`.

    Metrics: `ADAPTER/accuracy`, `ADAPTER/same` (the share of questions that are right or wrong as published),
    `ADAPTER/identical` (the share of equal completions); `partition/system1`, `partition/system2` (Jaccard index of
    the selected elements of both runs, where this profile has published its partition). Items: each answer, with the
    published `completion` and `correct` beside it.
    """
    metrics, items = {}, []
    adapters = published_adapters()
    folder = _answers(settings, adapters)
    for name, answers in json.loads((folder / "answers.json").read_text(encoding="utf-8")).items():
        published = published_items(adapters[name])
        rows = [
            {
                "adapter": name,
                **item,
                "published": {key: published[item["id"]][key] for key in ("completion", "correct")},
            }
            for item in answers
        ]
        items += rows
        metrics |= {
            f"{name}/accuracy": intervals.proportion([row["correct"] for row in rows]),
            f"{name}/same": intervals.proportion([row["correct"] == row["published"]["correct"] for row in rows]),
            f"{name}/identical": intervals.proportion(
                [row["completion"] == row["published"]["completion"] for row in rows]
            ),
        }
    metrics |= _selected_again(settings, examples)
    record = new_record(
        "again",
        settings,
        metrics=metrics,
        items=items,
        notebook="07_your_run.ipynb out.ipynb",
        origin=origin_of(folder),
    )
    write_record(record, settings.runs / "records" / "again.json")
    return record


def _answers(settings: Settings, adapters: dict[str, Path]) -> Path:
    """The folder with each adapter's greedy answers to the first test questions of both systems."""
    trained_by = load_profile(project_root() / TRAINED_BY, model={"dtype": settings.model.dtype}, speed=settings.speed)
    rows = _first_of_each(data.load_pool(trained_by), settings.evaluation.published_items)
    inputs = {
        **common_inputs(__file__, settings),
        "adapters": {name: file_hash(folder / "adapter_model.safetensors") for name, folder in adapters.items()},
        "evaluation": trained_by.evaluation.model_dump(include={"max_new_tokens", "batch_size"}),
        "data": fingerprint(rows),
    }
    folder = settings.runs / "again" / fingerprint(inputs)
    if not is_whole(folder):
        begun = origin()
        base, tokenizer = models.load_base(settings)
        answers = {}
        for name, path in adapters.items():
            model = PeftModel.from_pretrained(base, str(path))
            answers[name] = evaluation.score_greedy(model, tokenizer, rows, trained_by)
            base = model.unload()
        with completed(folder, inputs, begun) as scratch:
            write_atomically(scratch / "answers.json", json.dumps(answers))
    return folder


def _first_of_each(pool: Iterable[dict], count: int) -> list[dict]:
    """The first so many test rows of each system."""
    test = [row for row in pool if row["split"] == "test"]
    return [row for system in (1, 2) for row in [r for r in test if r["construction"] == system][:count]]


def _selected_again(settings: Settings, examples: Examples) -> dict[str, Metric]:
    folder = project_root() / "results" / settings.profile / "partition"
    if not folder.is_dir():
        return {}
    theirs, ours = Partition.load(folder), partition(settings, scores(settings, examples.systems))
    if theirs.shapes != ours.shapes:
        return {}
    overlaps = {}
    for system, (one, other) in enumerate(zip(ours.selected, theirs.selected, strict=True), start=1):
        either = int((one | other).sum())
        overlaps[f"partition/system{system}"] = Metric(int((one & other).sum()) / either, either)
    return overlaps


def main() -> None:
    """`python -m lorapar_utils.pipeline.again PROFILE`: a job of `make book`."""
    with told_on_the_command_line():
        settings = load_profile(sys.argv[1])
        record_again(settings, Examples(settings))


if __name__ == "__main__":
    main()
