"""One stage of an experiment: trained once, kept under the fingerprint of what it was trained from."""

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from lorapar_utils import distributed, training
from lorapar_utils.cache import completed, fingerprint, is_whole, origin, write_atomically
from lorapar_utils.data import learnt_from
from lorapar_utils.data.encoding import encode_examples
from lorapar_utils.errors import InputError
from lorapar_utils.machine import lock
from lorapar_utils.partition import Partition
from lorapar_utils.pipeline.adapted import AdaptedModel
from lorapar_utils.pipeline.inputs import common_inputs
from lorapar_utils.settings import ExperimentSection, Settings

# Kind of a stage -> the systems whose examples it trains on.
SYSTEMS = {"sft": (1,), "sft_all": (1, 2), "grpo": (2,)}


def stage_inputs(
    settings: Settings,
    spec: ExperimentSection,
    number: int,
    systems: dict[int, list[dict]],
    scores: str | None,
    watched: Sequence[dict],
) -> dict:
    """What stage `number` (from 1) is trained from. Settings that only later stages read are left out.

    Parameters
    ----------
    scores
        Fingerprint of the importance scores that the partition is made from; None without a partition.
    watched
        Validation rows that are answered while a stage trains: their outcomes are in its history.
    """
    kinds = set(spec.stages[:number])
    inputs = {
        **common_inputs(__file__, settings),
        "method": spec.method,
        # The control of stage 2 alone shares the stages before it.
        "selection": "importance" if spec.selection == "random_stage2" and "grpo" not in kinds else spec.selection,
        "stages": spec.stages[:number],
        "systems": {k: fingerprint(learnt_from(rows)) for k, rows in systems.items()},
        "adapter": settings.adapter.model_dump(),
    }
    if scores is not None:
        inputs |= {"scores": scores, "theta": settings.partition.theta}
    if "grpo" in spec.stages and watched:
        watch = settings.evaluation.model_dump(include={"watch_every", "max_new_tokens"})
        inputs["watch"] = watch | {"rows": fingerprint(watched)}
    shares = settings.partition.model_dump() if scores is not None else {}
    if kinds & {"sft", "sft_all"}:
        inputs |= {"alpha": shares.get("alpha"), "sft": settings.sft.model_dump()}
    if "grpo" in kinds:
        # Where vLLM runs changes no completion.
        inputs |= {"beta": shares.get("beta"), "grpo": settings.grpo.model_dump(exclude={"vllm_server", "vllm_memory"})}
    return inputs


def train(
    kind: str,
    inputs: dict,
    folder: Path,
    adapted: AdaptedModel,
    previous: Path | None,
    systems: dict[int, list[dict]],
    partition: Callable[[], Partition] | None,
    settings: Settings,
    watch: Callable[[], dict] | None,
) -> None:
    """Train a stage of `kind` and keep adapter and outcome in `folder`, unless they are there, whole.

    A stage that was interrupted goes on from its last checkpoint, to the same end.

    Parameters
    ----------
    previous
        Folder of the stage before; None for the first.
    partition
        Makes the partition; None trains every element of the adapter.
    watch
        See `training.run_sft`.
    """
    # One process decides for all, because another one could look when the folder has already been made.
    if distributed.by_first(lambda: is_whole(folder)):
        return
    model, tokenizer = adapted.after(previous)
    if partition is None:
        parameters = dict(model.named_parameters())
        masks, jaccard = {name: torch.ones_like(parameters[name], dtype=torch.bool) for name in adapted.trainable}, None
    else:
        selected = partition()
        masks, jaccard = selected.stage_mask(2 if kind == "grpo" else 1), selected.jaccard
    run = training.run_grpo if kind == "grpo" else training.run_sft
    # A checkpoint of P-Tuning lacks the encoder (see `models.save_adapter`), so nothing can go on from it.
    checkpoints = None if settings.adapter.kind == "p_tuning" else folder.with_name(f".{folder.name}-steps")
    began, begun = time.time(), origin()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    adapted.trained_to(None)
    history = run(model, tokenizer, rows_of(kind, systems), masks, settings, checkpoints, watch)
    adapted.trained_to(folder)
    elements = sum(mask.numel() for mask in masks.values())
    outcome = {
        "history": history,
        "active": sum(int(mask.sum()) for mask in masks.values()) / elements,
        "elements": elements,
        "jaccard": jaccard,
        "train_seconds": round(time.time() - began, 1),
        "peak_bytes": _peak_bytes(),
    }

    def keep():
        with completed(folder, inputs, begun) as scratch:
            adapted.save(scratch)
            if partition is not None:
                selected.save(scratch / "partition")
            write_atomically(scratch / "outcome.json", json.dumps(outcome))
        if checkpoints is not None:
            shutil.rmtree(checkpoints, ignore_errors=True)

    distributed.by_first(keep)


@contextmanager
def alone_at(folder: Path) -> Iterator[None]:
    """No other run trains this stage meanwhile: both would write the same checkpoints.

    Raises
    ------
    InputError
        The lock cannot be written.
    """
    if not distributed.state().is_main_process:
        yield
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = lock(folder.with_name(f".{folder.name}.lock"))
    except OSError as error:
        raise InputError(
            f"runs: {folder.parent} cannot be written ({error}); free space or change its rights"
        ) from None
    with held:
        yield


def check_rows(kinds: Sequence[str], systems: dict[int, list[dict]], tokenizer, settings: Settings) -> None:
    """Encode all that these kinds of stages will read. An InputError names what one of them cannot read."""
    for kind in kinds:
        rows = rows_of(kind, systems)
        if kind == "grpo":
            training.prompts_to_reinforce(rows, tokenizer, settings)
        else:
            encode_examples(rows, tokenizer, settings)


def rows_of(kind: str, systems: dict[int, list[dict]]) -> list[dict]:
    """The examples that a kind of stage trains on."""
    return [row for system in SYSTEMS[kind] for row in systems[system]]


def _peak_bytes() -> int:
    """The most memory that this process has held so far: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
