"""An experiment: its stages, each trained and measured once, and the record that is put together from both."""

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

from lorapar_utils import distributed, evaluation, models
from lorapar_utils.cache import fingerprint, is_whole, origin_of
from lorapar_utils.pipeline import launch
from lorapar_utils.pipeline.adapted import AdaptedModel
from lorapar_utils.pipeline.examples import Examples
from lorapar_utils.pipeline.measure import measure, measure_inputs
from lorapar_utils.pipeline.record import experiment_record
from lorapar_utils.pipeline.scores import partition, scores, scores_folder
from lorapar_utils.pipeline.train import alone_at, check_rows, stage_inputs, train
from lorapar_utils.records import Record, read_record, write_record
from lorapar_utils.settings import ExperimentSection, Settings


def experiment(settings: Settings, name: str, seed: int) -> Record:
    """Train and score one configuration of `experiments`; what was made before from the same inputs is read back.

    A stage that another experiment has trained from the same inputs is not trained again. The record is put together
    from the kept outcomes each time, so a metric that was added later needs no training.

    Returns
    -------
    Record
        Metrics `STAGE/system1`, `STAGE/system2`, `STAGE/accuracy`, … for STAGE in `base` (no training), `stage1`,
        `stage2`; `active/stage1`, …; tables `history_STAGE`; items with test outcomes.

    Raises
    ------
    InputError
        An unknown experiment, or, before anything is trained, examples that one of its stages cannot read.
    """
    profile, run = settings, f"{name}-seed{seed}"
    spec = settings.experiments.get(name)
    settings = settings.for_experiment(name, seed)
    examples = Examples(settings)
    systems = examples.systems if spec.stages else {}
    partial = spec.method == "lorapar"
    trained, measured = _kept_at(settings, spec, examples, systems)
    missing = not all(is_whole(folder) for _, folder in [*trained.values(), *measured.values()])
    # Every process has to see the same.
    if distributed.by_first(lambda: missing):
        if launch.are_to_start(settings):
            launch.launch("experiment", profile, name, seed)
        else:
            _check(settings, spec.stages, systems)

    adapted = AdaptedModel(settings, has_stages=bool(spec.stages))
    select = (
        cache(lambda: partition(settings, scores(settings, systems), spec.selection, adapted.initial_values))
        if partial
        else None
    )
    watch = _watch(adapted, examples, settings) if "grpo" in spec.stages and examples.watched else None
    sampled = examples.chains(spec)
    outcomes, folders, previous = {}, [], None
    for stage, (inputs, folder) in measured.items():
        outcomes[stage] = {"history": []}
        if stage in trained:
            kind, (stage_input, stage_folder) = spec.stages[int(stage[-1]) - 1], trained[stage]
            with alone_at(stage_folder):
                train(kind, stage_input, stage_folder, adapted, previous, systems, select, settings, watch)
            _show(settings.runs / "experiments" / run / stage, stage_folder)
            outcomes[stage] |= _outcome(stage_folder)
            folders.append(stage_folder)
            previous = stage_folder
        measure(inputs, folder, adapted, previous, examples.measured(spec), sampled, settings, spec.measured_on)
        outcomes[stage] |= _outcome(folder)
        folders.append(folder)

    origins = [origin_of(folder) for folder in folders]
    newest = max(origins, key=lambda origin: origin["created"])
    # Costs are those of the training, so its hardware is the record's.
    hardware = origin_of(previous or folders[0])["hardware"]
    origin = newest | {"hardware": hardware, "dirty": any(o["dirty"] for o in origins) or newest["dirty"]}
    path = settings.runs / "records" / f"{run}.json"
    distributed.by_first(
        lambda: write_record(experiment_record(settings, spec, run, outcomes, origin, examples.pool, systems), path)
    )
    return read_record(path)


def is_kept(settings: Settings, name: str, seed: int, examples: Examples) -> bool:
    """Whether all that an experiment trains and measures is kept, so that only its record has to be put together."""
    spec, settings = settings.experiments[name], settings.for_experiment(name, seed)
    systems = Examples(settings, examples.pool).systems if spec.stages else {}
    trained, measured = _kept_at(settings, spec, examples, systems)
    return all(is_whole(folder) for _, folder in [*trained.values(), *measured.values()])


Kept = dict[str, tuple[dict, Path]]


def _kept_at(settings: Settings, spec: ExperimentSection, examples: Examples, systems: dict) -> tuple[Kept, Kept]:
    """What each stage of an experiment is trained from, and measured from, with the folder that keeps the outcome."""
    stages = settings.runs / "stages"
    kept_scores = scores_folder(settings, systems).name if spec.method == "lorapar" else None
    trained, measured = {}, {}
    for number in range(1, len(spec.stages) + 1):
        inputs = stage_inputs(settings, spec, number, systems, kept_scores, examples.watched)
        trained[f"stage{number}"] = inputs, stages / fingerprint(inputs)
    for stage in trained or ("base",):
        folder = trained[stage][1].name if trained else None
        inputs = measure_inputs(settings, folder, examples.measured(spec), examples.chains(spec), spec.measured_on)
        measured[stage] = inputs, stages / fingerprint(inputs)
    return trained, measured


def _check(settings: Settings, kinds: tuple[str, ...], systems: dict[int, list[dict]]) -> None:
    """Read all that training and scoring will read: what cannot be read is named before the first stage is trained."""
    evaluation.check_benchmarks(settings)
    tokenizer = models.load_tokenizer(settings)
    with redirect_stdout(io.StringIO()):  # what is left out is said when the stage begins
        check_rows(kinds, systems, tokenizer, settings)


def _watch(adapted: AdaptedModel, examples: Examples, settings: Settings) -> Callable[[], dict]:
    """Greedy accuracy of each system (of free text, overlap) on the watched validation prompts."""

    def watch() -> dict:
        items = evaluation.score_greedy(*adapted.current, examples.watched, settings)
        metrics = evaluation.accuracy_metrics(items)
        return {f"validation/{key}": metrics[key].value for key in ("system1", "system2", "overlap") if key in metrics}

    return watch


def _outcome(folder: Path) -> dict:
    return json.loads((folder / "outcome.json").read_text(encoding="utf-8"))


def _show(link: Path, folder: Path) -> None:
    """Point `experiments/NAME-seedK/STAGE` to the stage's folder, for people."""

    def point():
        link.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # some file systems have no links; nothing of ours reads them
            link.unlink(missing_ok=True)
            link.symlink_to(Path("../..") / folder.parent.name / folder.name)

    distributed.by_first(point)
