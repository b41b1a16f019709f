"""LLaMA-2-7B's architecture with random weights on a GPU: scoring, partition, training, rollouts; the plan beside them.

    python benchmarks/gpu.py OUT.json [ARCHITECTURE] [--rehearse]

Speed needs no trained weights. Needs a GPU and what `requirements.lock` installs. Pairs are timed in turns, median of
`REPEATS`; of a stage, TRL's trainer's median step after the first. `planned` is what `make plan` says there. OUT.json
grows as parts are done. `--rehearse` takes every measurement on the CPU with a few tokens, so that an error in this
file costs no time on a GPU; its figures mean nothing, and ARCHITECTURE should be a small one.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from costs import SHARED, alternating, examples, make_tokenizer, words
from measure import peak_bytes, timed
from training import StepTimes
from transformers import AutoConfig, AutoModelForCausalLM

from lorapar_utils import importance, models, training
from lorapar_utils.cache import write_atomically
from lorapar_utils.fast.completions import complete, uniform
from lorapar_utils.optim import ActiveAdamW
from lorapar_utils.partition import build_partition
from lorapar_utils.planning.plan import Model, Need, machine_named
from lorapar_utils.settings import load_profile, project_root
from lorapar_utils.training import stages
from lorapar_utils.training.rewards import REWARDS

REHEARSED = "--rehearse" in sys.argv
DEVICE, MACHINE = ("cpu", "H100") if REHEARSED else ("cuda", "here")
REPEATS, STEPS = (1, 2) if REHEARSED else (5, 4)
BATCH = 8
PROMPT, ANSWER, SAMPLES, TOKENS = (SHARED + 6, 6, 2, 3) if REHEARSED else (98, 123, 8, 64)
LENGTHS = (PROMPT, ANSWER, SHARED)
STEP = 8  # examples a step of SFT, and prompts a step of GRPO
# Rows of a pass, and whether activations are computed again.
VARIANTS = {"sft": [(1, True), (1, False), (8, False)], "grpo": [(8, True), (8, False), (16, False)]}


def main(out: str, architecture: str = "Llama-2-7b-hf") -> None:
    if not (REHEARSED or torch.cuda.is_available()):
        sys.exit("benchmarks/gpu.py: this machine has no GPU that torch can use; nothing was measured")
    machine_named(MACHINE)  # a card that the plan does not know is refused before anything is measured
    settings = load_profile(
        "llama2-7b",
        model={"source": f"random/{architecture}", "system_prompt": words(0, SHARED)},
        sft={"accumulation": STEP},
        grpo={"prompts_per_step": STEP, "completions": SAMPLES, "max_completion_length": TOKENS, "rollout_batch": None},
    )
    kept = json.loads((project_root() / "profiles" / "architectures" / f"{architecture}.json").read_text())
    with torch.device(DEVICE):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**kept), dtype=torch.bfloat16)
    model = models.attach_adapter(base.requires_grad_(False).eval(), settings)
    some = random_examples(BATCH * 2, kept["vocab_size"])
    plan = Model(settings, LENGTHS)
    device = "a CPU, rehearsed" if REHEARSED else torch.cuda.get_device_name()
    found = {"device": device, "torch": torch.__version__, "architecture": architecture}

    def note(**parts) -> None:
        found.update(parts)
        write_atomically(Path(out), json.dumps(found, indent=1))
        print(json.dumps(parts), flush=True)

    scored, scores = scoring(model, some, plan)
    taken = [timed(lambda: build_partition(scores, scores, theta=0.9)) for _ in range(REPEATS)]
    note(scoring=scored, partition_seconds=median(taken))
    partition = build_partition(scores, scores, theta=0.9)
    note(training=one_step(model, some[:BATCH], partition, settings))
    # As many as the profile scores in one call, which pays once for what a call costs besides its passes.
    many = random_examples(BATCH * (2 if REHEARSED else settings.importance.examples // BATCH), kept["vocab_size"])
    taken = in_turns(scored_and_plain(model, many))
    note(scoring_as_the_profile={"examples": len(many), "batched_over_plain": taken["batched"] / taken["plain_pass"]})
    note(rollout=rollout(model, kept["vocab_size"], plan))
    for stage, variants in VARIANTS.items():
        rows = []
        for variant in variants:
            rows.append(whole_stage(stage, model, partition, settings, *variant))
            note(**{stage: rows})


def random_examples(count: int, vocabulary: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (count, PROMPT + ANSWER), generator=generator).tolist()
    return [{"input_ids": row, "labels": [-100] * PROMPT + row[PROMPT:]} for row in ids]


def scoring(model, examples, plan: Model) -> tuple[dict, dict]:
    """Scores in batches, against one plain forward and backward of the same, and against one example at a time.

    The error is that to plain autograd of one example after the other, with adapters in fp32.
    """
    ways = scored_and_plain(model, examples)
    ways["one_by_one"] = lambda: importance.score_importance(model, examples, batch_size=1)
    taken = in_turns(ways)
    scores, peak = with_peak(ways["batched"])
    about = {"examples": len(examples), "seconds": taken, "peak_bytes": peak}
    need = plan.passes(machine_named(MACHINE), "score", BATCH, PROMPT + ANSWER, ANSWER, times=len(examples) // BATCH)
    about |= planned(plan, [need], 8 * plan.elements)
    about["batched_over_plain"] = taken["batched"] / taken["plain_pass"]
    about["one_by_one_over_batched"] = taken["one_by_one"] / taken["batched"]
    exact = importance.score_importance(model, examples, batch_size=1, in_batches=False)
    error = sum((scores[name] - values).square().sum() for name, values in exact.items())
    about["error_over_norm"] = float((error / sum(values.square().sum() for values in exact.values())).sqrt())
    return about, scores


def scored_and_plain(model, examples) -> dict[str, Callable]:
    """Importance in batches, and one plain forward and backward of the same."""

    def plain():
        for start in range(0, len(examples), BATCH):
            one_pass(model, examples[start : start + BATCH]).backward()
        model.zero_grad(set_to_none=True)

    return {"batched": lambda: importance.score_importance(model, examples, batch_size=BATCH), "plain_pass": plain}


def one_step(model, batch, partition, settings) -> dict:
    """A step of LoRA-PAR's SFT against one of plain LoRA with fused AdamW."""
    named = list(importance.lora_parameters(model).items())
    everything = [parameter for _, parameter in named]
    active = ActiveAdamW(named, partition.stage_mask(1))
    for parameter in everything:
        parameter.requires_grad_(True)
    dense = torch.optim.AdamW(everything, fused=True)

    def step(optimizer):
        one_pass(model, batch).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    taken = in_turns({"lora_par": lambda: step(active), "lora": lambda: step(dense)})
    _, peak = with_peak(lambda: step(active))
    whole = settings.changed(sft={"batch_size": len(batch), "gradient_checkpointing": False})
    plan, size = Model(whole, LENGTHS), partition_size(partition)
    need = plan.passes(machine_named(MACHINE), "sft", len(batch), PROMPT + ANSWER, ANSWER)
    return {
        "tokens": len(batch) * (PROMPT + ANSWER),
        "seconds": taken,
        "lora_par_over_lora": taken["lora_par"] / taken["lora"],
        "peak_bytes": peak,
        "optimizer_bytes": active.state_bytes(),
        **planned(plan, [need], 5 * plan.elements + 16 * size),
    }


def rollout(model, vocabulary: int, plan: Model) -> dict:
    """Completions of `BATCH` prompts, `SAMPLES` each, none of which ends early, against `model.generate`."""
    prompts = torch.randint(3, vocabulary, (BATCH, PROMPT), generator=torch.Generator().manual_seed(1))
    draws = uniform(BATCH * SAMPLES, TOKENS, 0)
    wanted = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "num_return_sequences": SAMPLES, "do_sample": True}

    def ours():
        ids = prompts.tolist()
        complete(model, ids, ends=[], max_new_tokens=TOKENS, samples=SAMPLES, temperature=1.0, draws=draws)

    def theirs():
        ids = prompts.to(DEVICE)
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), top_k=0, **wanted)

    taken = in_turns({"complete": ours, "generate": theirs})
    _, peak = with_peak(ours)
    return {
        "completions": BATCH * SAMPLES,
        "tokens_each": TOKENS,
        "seconds": taken,
        "completions_a_second": BATCH * SAMPLES / taken["complete"],
        "generate_over_complete": taken["generate"] / taken["complete"],
        "peak_bytes": peak,
        **planned(plan, plan.batches(machine_named(MACHINE))["grpo"][1:], 0),
    }


def whole_stage(stage: str, model, partition, settings, rows: int, checkpointing: bool) -> dict:
    """A step of the stage as the book runs it, by TRL's trainer."""
    # A random model earns nothing, and what has no advantage is not differentiated: as the plan, count with all of it.
    REWARDS["answer"] = [alternating]
    chosen = {"gradient_checkpointing": checkpointing}
    if stage == "sft":
        chosen = settings.changed(sft=chosen | {"batch_size": rows, "accumulation": STEP // rows})
    else:
        chosen = settings.changed(grpo=chosen | {"micro_batch": rows, "steps": STEPS})
    plan, size = Model(chosen, LENGTHS), partition_size(partition)
    needs = plan.batches(machine_named(MACHINE))[stage]
    times, train = StepTimes(), stages._train

    def timed_train(trainer, optimizer):
        trainer.add_callback(times)
        return train(trainer, optimizer)

    def whole() -> None:
        run = training.run_sft if stage == "sft" else training.run_grpo
        run(model, make_tokenizer(), examples(STEP * STEPS, PROMPT, ANSWER), partition.stage_mask(1), chosen)

    torch.cuda.empty_cache()
    with mock.patch.object(stages, "_train", timed_train):
        _, peak = with_peak(whole)
    free, total = (0, 0) if REHEARSED else torch.cuda.mem_get_info()
    return {
        "rows": rows,
        "checkpointing": checkpointing,
        "seconds_a_step": times.seconds,
        "peak_bytes": peak,
        "device_bytes": total - free,
        **planned(plan, needs, 5 * plan.elements + 16 * size),
    }


def partition_size(partition) -> int:
    return sum(int(mask.sum()) for mask in partition.stage_mask(1).values())


def planned(plan: Model, needs: list[Need], optimizer: float) -> dict:
    """What `make plan` says: seconds, and the bytes of tensors (libraries apart)."""
    memory = plan.memory(machine_named(MACHINE), needs, optimizer)
    seconds = sum(need.seconds for need in needs)
    return {"planned_seconds": seconds, "planned_bytes": sum(memory.values()) - memory["libraries"]}


def with_peak(work: Callable[[], object]) -> tuple[object, int]:
    """What `work` returns, and the most bytes that are taken meanwhile: of the card's tensors; on a CPU, the rise."""
    results = []
    if REHEARSED:
        peak = peak_bytes(lambda: results.append(work()))
    else:
        torch.cuda.reset_peak_memory_stats()
        results.append(work())
        peak = torch.cuda.max_memory_allocated()
    return results[0], peak


def one_pass(model, batch) -> torch.Tensor:
    ids = torch.tensor([example["input_ids"] for example in batch], device=DEVICE)
    labels = torch.tensor([example["labels"] for example in batch], device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        return model(input_ids=ids, labels=labels, use_cache=False).loss


def in_turns(ways: dict) -> dict[str, float]:
    """Median seconds of each, timed one after the other in every round; the first round only warms up."""

    def whole(way):
        way()
        if not REHEARSED:
            torch.cuda.synchronize()

    rounds = [{name: timed(lambda way=way: whole(way)) for name, way in ways.items()} for _ in range(REPEATS + 1)]
    return {name: median(one[name] for one in rounds[1:]) for name in ways}


if __name__ == "__main__":
    main(*(word for word in sys.argv[1:] if word != "--rehearse"))
