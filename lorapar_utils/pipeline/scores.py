"""The importance phase: the scores of every LoRA element for both systems, how stable they are, and the partition."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import scipy
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from lorapar_utils import distributed, models
from lorapar_utils.cache import completed, fingerprint, is_whole, origin, write_atomically
from lorapar_utils.data import learnt_from
from lorapar_utils.data.encoding import encode_examples
from lorapar_utils.fast.architecture import rotation_limit
from lorapar_utils.importance import score_importance
from lorapar_utils.partition import (
    Partition,
    build_partition,
    largest_partition,
    random_in_matrix_partition,
    random_partition,
    random_stage2_partition,
    swapped_partition,
)
from lorapar_utils.pipeline import launch
from lorapar_utils.pipeline.inputs import common_inputs
from lorapar_utils.settings import Settings

Scores = dict[str, torch.Tensor]
Systems = dict[int, list[dict]]
STABILITY_DRAWS = 3


def scores(settings: Settings, systems: Systems) -> tuple[Scores, Scores]:
    """Importance of every LoRA element to System 1 and to System 2, on `importance.examples` of each.

    Parameters
    ----------
    systems
        D1 and D2 (`Examples.systems`).
    """
    folder = scores_folder(settings, systems)
    if not distributed.by_first(lambda: is_whole(folder)):
        if launch.are_to_start(settings):
            launch.launch("scores", settings)
        else:
            _make_scores(settings, systems, folder)
    order = None
    loaded = []
    for system in (1, 2):
        values = load_file(folder / f"system{system}.safetensors")
        order = order or _model_order(values)
        loaded.append({name: values[name] for name in order})
    return loaded[0], loaded[1]


def scores_folder(settings: Settings, systems: Systems) -> Path:
    """Where these scores are, or will be."""
    return settings.runs / "scores" / fingerprint(_inputs(settings, systems))


def _inputs(settings: Settings, systems: Systems) -> dict:
    return {
        **common_inputs(__file__, settings),
        # The outcome of the votes. Teachers may be asked again: with the same outcome, the scores stay current.
        **{f"system{k}": fingerprint(learnt_from(rows)) for k, rows in systems.items()},
        "adapter": settings.adapter.model_dump(),
        "importance": settings.importance.model_dump(include={"examples", "score"}),
        "sft": settings.sft.model_dump(include={"max_length", "long_rows"}),
    }


def _make_scores(settings: Settings, systems: Systems, folder: Path) -> None:
    count, begun = settings.importance.examples, origin()
    both = _score(settings, [_shuffled(systems[k], settings)[:count] for k in (1, 2)])

    def keep():
        with completed(folder, _inputs(settings, systems), begun) as scratch:
            for system, values in enumerate(both, start=1):
                save_file(values, scratch / f"system{system}.safetensors")

    distributed.by_first(keep)


def stability(settings: Settings, systems: Systems) -> list[dict]:
    """How far importance depends on which examples are scored, and on how the adapter was drawn.

    Returns
    -------
    list of dict
        `system`; `differ`: `examples` (two disjoint samples of `n` under one adapter, n from `importance.stability`) or
        `adapter` (one sample of the largest n under the adapters of two seeds); `draw` 1, 2, … `STABILITY_DRAWS`;
        `rank_correlation` (Spearman) of all elements; `by_matrix`, that of the matrices' mean scores; `jaccard` of the
        sets selected at the profile's theta. Sizes that leave no second sample are left out.
    """
    folder = stability_folder(settings, systems)
    if not is_whole(folder):
        begun = origin()
        rows = _stability_rows(settings, systems) if settings.importance.stability else []
        with completed(folder, _stability_inputs(settings, systems), begun) as scratch:
            write_atomically(scratch / "stability.json", json.dumps(rows))
    return json.loads((folder / "stability.json").read_text(encoding="utf-8"))


def stability_folder(settings: Settings, systems: Systems) -> Path:
    """Where these rows are, or will be."""
    return settings.runs / "stability" / fingerprint(_stability_inputs(settings, systems))


def _stability_inputs(settings: Settings, systems: Systems) -> dict:
    compared = {"sizes": settings.importance.stability, "draws": STABILITY_DRAWS, "theta": settings.partition.theta}
    return _inputs(settings, systems) | compared


def _stability_rows(settings: Settings, systems: Systems) -> list[dict]:
    seeded = [settings.changed(seed=settings.seed + draw) for draw in range(STABILITY_DRAWS)]
    rows = []
    model = _fresh_adapter(settings)
    for draw, drawn in enumerate(seeded, start=1):
        for system, n in itertools.product(systems, settings.importance.stability):
            order = _shuffled(systems[system], drawn)
            if 2 * n <= len(order):
                pair = _score(settings, [order[:n], order[n : 2 * n]], model)
                about = {"system": system, "differ": "examples", "n": n, "draw": draw}
                rows.append(about | _agreement(*pair, settings))
    del model  # before the others are loaded
    largest = max(settings.importance.stability)
    samples = [_shuffled(systems[system], settings)[:largest] for system in systems]
    by_seed = [_score(drawn, samples) for drawn in seeded]
    for draw, (first, second) in enumerate(itertools.combinations(by_seed, 2), start=1):
        for system, sample in zip(systems, samples, strict=True):
            about = {"system": system, "differ": "adapter", "n": len(sample), "draw": draw}
            rows.append(about | _agreement(first[system - 1], second[system - 1], settings))
    return rows


def _agreement(first: Scores, second: Scores, settings: Settings) -> dict[str, float]:
    both = (first, second)
    flat = [torch.cat([values.flatten() for values in scores.values()]).numpy() for scores in both]
    means = [[float(values.mean()) for values in scores.values()] for scores in both]
    return {
        "rank_correlation": float(scipy.stats.spearmanr(*flat).statistic),
        "by_matrix": float(scipy.stats.spearmanr(*means).statistic),
        "jaccard": build_partition(first, second, theta=settings.partition.theta).jaccard,
    }


def partition(
    settings: Settings,
    both: tuple[Scores, Scores],
    selection: str = "importance",
    phi: Callable[[], Scores] | None = None,
) -> Partition:
    """The profile's partition of these scores, or a control of equal size (those of `lorapar_utils.partition`).

    Parameters
    ----------
    phi
        Gives the adapter's initial values, for `selection = "magnitude"`.
    """
    values = settings.partition
    built = build_partition(*both, theta=values.theta, alpha=values.alpha, beta=values.beta)
    if selection == "magnitude":
        return largest_partition(built, {name: value.abs() for name, value in phi().items()})
    controls = {
        "random": random_partition,
        "random_in_matrix": random_in_matrix_partition,
        "random_stage2": random_stage2_partition,
    }
    if selection in controls:
        return controls[selection](built, settings.seed)
    return swapped_partition(built) if selection == "swapped" else built


def _shuffled(rows: list[dict], settings: Settings) -> list[dict]:
    generator = torch.Generator().manual_seed(settings.seed)
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


def _fresh_adapter(settings: Settings) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    base, tokenizer = models.load_base(settings)
    return models.attach_adapter(base, settings), tokenizer


def _score(settings: Settings, samples: list[list[dict]], loaded: tuple | None = None) -> list[Scores]:
    model, tokenizer = loaded or _fresh_adapter(settings)
    results = []
    for rows in samples:
        examples = encode_examples(rows, tokenizer, settings)
        longest = max(len(example["input_ids"]) for example in examples)
        # Beyond this limit a model rotates positions by the longest row of a batch, so scores would depend on that row.
        size = 1 if longest > rotation_limit(model.get_base_model()) else settings.importance.batch_size
        results.append(
            score_importance(
                model,
                examples,
                batch_size=size,
                score=settings.importance.score,
                in_batches="importance" in settings.shortcuts,
            )
        )
    return results


def _model_order(values: Scores) -> list[str]:
    """Layer by layer, A before B: safetensors keeps names, not order, and ties are broken by order."""

    def key(name: str):
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]

    return sorted(values, key=key)
