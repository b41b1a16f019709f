"""Accuracy of a model on the pool, GSM8K, MMLU and HumanEval: greedy, and sampled pass@k (paper, section 4)."""

import time
from collections.abc import Sequence
from functools import partial

from accelerate.utils import gather_object
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorapar_utils import data, processes, statistics
from lorapar_utils.encoding import answer_ids, end_tokens, prompt_ids
from lorapar_utils.errors import InputError
from lorapar_utils.generation import complete, uniform, whole_base
from lorapar_utils.harness import LeanLM, benchmark_tasks, score_harness
from lorapar_utils.humaneval import check_allowed, score_humaneval
from lorapar_utils.label_scores import reply_log_probs
from lorapar_utils.records import Record, new_record
from lorapar_utils.rewards import answers_match, extract_answer, mentions, overlap
from lorapar_utils.settings import Settings
from lorapar_utils.statistics import Metric

BENCHMARKS = ("pool", "gsm8k", "mmlu", "humaneval")


def evaluate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: str,
    settings: Settings,
    *,
    split: str = "test",
) -> Record:
    """Greedy accuracy on one benchmark's split.

    Parameters
    ----------
    benchmark
        `pool` (System 1 and System 2 apart, by construction, in the layout that training teaches; free text by its
        overlap with the reference; the loss of the reference in both), or what `lm-eval`
        defines as `gsm8k` (few-shot, generative) and `mmlu` (few-shot, the likeliest of four letters), or `humaneval`
        (pass@1 of its 164 problems; needs `evaluation.run_model_code`).
    split
        `test`, once, at the end; `validation`, which only the pool has, to choose anything.

    Returns
    -------
    Record
        Metrics of `benchmark_metrics`; items: one outcome an example.
    """
    started = time.time()
    items = benchmark_items(model, tokenizer, benchmark, settings, split=split)
    metrics = benchmark_metrics(benchmark, items)
    return new_record(f"{benchmark}-{split}", settings, metrics=metrics, items=items, seconds=time.time() - started)


def benchmark_items(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: str,
    settings: Settings,
    *,
    split: str = "test",
) -> list[dict]:
    """One outcome an example of `evaluate`: `id`, `task`, `completion`, `correct`, `truncated`, …"""
    if benchmark not in BENCHMARKS:
        raise InputError(f"benchmark: {benchmark!r} is not one of {', '.join(BENCHMARKS)}")
    if benchmark == "pool":
        examples = [row for row in data.load_pool(settings) if row["split"] == split]
        return score_pool(model, tokenizer, examples, settings)
    if split != "test":
        raise InputError(
            f"split = {split!r}: {benchmark} is scored on test only; choose settings on the pool's validation"
        )
    if benchmark == "humaneval":
        score = partial(score_humaneval, model, tokenizer, settings)
    else:
        lm = LeanLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.evaluation.batch_size)
        score = partial(score_harness, lm, benchmark, settings)
    with whole_base(model):
        return processes.by_first(score)


def check_benchmarks(settings: Settings) -> None:
    """Whether `evaluation.benchmarks` can be scored here: their data is there, and what runs code may run it.

    Raises
    ------
    InputError
        As `evaluate` would, but before anything is trained.
    """
    for name in settings.evaluation.benchmarks:
        if name == "humaneval":
            check_allowed(settings)
        else:
            benchmark_tasks(name, settings)


def benchmark_metrics(benchmark: str, items: Sequence[dict]) -> dict[str, Metric]:
    """Metrics of a benchmark's outcomes, each with n and a 95 % interval.

    `accuracy`, and `truncated` (completions that never ended) where it was noted; `accuracy_metrics` for the pool;
    `flexible` (the last number, whatever the layout) for GSM8K; `macro` (the mean over subjects) for MMLU; with several
    samples of each HumanEval problem the unbiased `pass@1` and `pass@k`, k the number of samples, over problems.
    """
    if benchmark == "pool":
        return accuracy_metrics(items)
    metrics = {"accuracy": statistics.proportion([item["correct"] for item in items])}
    for field in ("truncated", "flexible"):
        if noted := [item[field] for item in items if item.get(field) is not None]:
            metrics[field] = statistics.proportion(noted)
    if benchmark == "mmlu":
        metrics["macro"] = statistics.macro_average([(item["task"], item["correct"]) for item in items])
    hits: dict[str, list[bool]] = {}
    for item in items:
        hits.setdefault(item["id"], []).append(item["correct"])
    for k in {1, len(items) // len(hits)} if len(hits) < len(items) else ():
        metrics[f"pass@{k}"] = statistics.mean([statistics.pass_at_k(sum(h), len(h), k) for h in hits.values()])
    return metrics


def accuracy_metrics(items: Sequence[dict]) -> dict[str, Metric]:
    """Metrics of the pool's outcomes, each with n and interval, over all items and by system where it is known.

    `accuracy` (by system `system1`, `system2`) and `mentioned` (`mentioned1`, `mentioned2`), the completions that
    contain the answer anywhere: what a model knows but does not put in the `####` layout. Of free text `overlap` in
    their place. `truncated`, and the `loss` of the reference solutions where it was measured.
    """
    metrics = {"truncated": statistics.proportion([item["truncated"] for item in items])}
    if losses := [item["loss"] for item in items if "loss" in item]:
        metrics["loss"] = statistics.mean(losses)
    if overlaps := [item["overlap"] for item in items if "overlap" in item]:
        return metrics | {"overlap": statistics.mean(overlaps)}
    for system, accuracy in ((None, "accuracy"), (1, "system1"), (2, "system2")):
        own = [item for item in items if system in (None, item["system"])]
        if own:
            metrics[accuracy] = statistics.proportion([item["correct"] for item in own])
            metrics[f"mentioned{system or ''}"] = statistics.proportion([item["mentioned"] for item in own])
    return metrics


def score_pool(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    settings: Settings,
) -> list[dict]:
    """`score_greedy`, and each example's `loss`: how unexpected its reference solution is to the model."""
    items = score_greedy(model, tokenizer, examples, settings)
    losses = solution_losses(model, tokenizer, examples, settings)
    return [item | {"loss": loss} for item, loss in zip(items, losses, strict=True)]


def score_greedy(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    settings: Settings,
) -> list[dict]:
    """One greedy completion an example, scored: `{"id", "system", "task", "completion", "correct", "truncated"}`.

    Also `mentioned`, whether the answer stands anywhere in the completion; of free text `overlap` instead.
    """
    completions = generate(model, tokenizer, [e["prompt"] for e in examples], settings)
    items = []
    for example, [(text, truncated)] in zip(examples, completions, strict=True):
        item = {
            "id": example["id"],
            "system": data.construction_system(example["steps"]),
            "task": example["task"],
            "completion": text,
            "correct": is_correct(text, example["answer"], marked=not settings.has_free_text),
            "truncated": truncated,
        }
        if settings.has_free_text:
            item["overlap"] = overlap(text, example["solution"])
        else:
            item["mentioned"] = mentions(text, example["answer"])
        items.append(item)
    return items


def solution_losses(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    settings: Settings,
) -> list[float]:
    """The loss of each example's solution and its end, in nats a token, as stage 1 trains on it; nothing is cut off."""
    pairs = [
        (prompt_ids(example["prompt"], tokenizer, settings), answer_ids(example["solution"], tokenizer))
        for example in examples
    ]
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    size = settings.evaluation.batch_size
    own = processes.state()
    starts = range(0, len(order), size)[own.process_index :: own.num_processes]
    losses: list[tuple[int, float]] = []
    with whole_base(model):
        for start in tqdm(starts, desc="loss of the references", leave=False):
            rows = order[start : start + size]
            totals = reply_log_probs(model.eval(), [pairs[i] for i in rows])
            losses += [(i, -total / len(pairs[i][1])) for i, total in zip(rows, totals, strict=True)]
    return [loss for _, loss in sorted(gather_object(losses))]


def pass_at(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    settings: Settings,
) -> dict[str, Metric]:
    """Sampled pass@1 and pass@k (k = `evaluation.pass_k`, temperature 1) with bootstrap intervals over prompts."""
    k = settings.evaluation.pass_k
    completions = generate(model, tokenizer, [e["prompt"] for e in examples], settings, samples=k)
    hits = [
        sum(is_correct(text, example["answer"], marked=True) for text, _ in group)
        for example, group in zip(examples, completions, strict=True)
    ]
    return {
        "pass@1": statistics.mean([statistics.pass_at_k(h, k, 1) for h in hits]),
        f"pass@{k}": statistics.mean([statistics.pass_at_k(h, k, k) for h in hits]),
    }


def is_correct(completion: str, reference: str, *, marked: bool = False) -> bool:
    """Whether the completion's final answer is the reference.

    Parameters
    ----------
    marked
        Only what stands after `####` is an answer, as in pools that teach this layout; else a completion without `####`
        is its own answer, as free text is.
    """
    answer = extract_answer(completion)
    if answer is None and not marked:
        answer = completion.strip()
    return answer is not None and answers_match(answer, reference)


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    settings: Settings,
    *,
    samples: int = 0,
) -> list[list[tuple[str, bool]]]:
    """Completions of each prompt, in order: one greedy, or `samples` drawn at temperature 1.

    Under `accelerate launch` each process completes its share of the prompts, and all return everybody's.

    Returns
    -------
    list of list of (text, truncated)
        `truncated` where the completion reached `evaluation.max_new_tokens` without ending.
    """
    model.eval()
    encoded = [prompt_ids(prompt, tokenizer, settings) for prompt in prompts]
    ends = end_tokens(model, tokenizer)
    # By length, so little is padded.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    size = max(1, settings.evaluation.batch_size // max(1, samples))
    limit = settings.evaluation.max_new_tokens
    draws = uniform(len(encoded) * samples, limit, settings.seed).view(len(encoded), samples, limit)
    own = processes.state()
    starts = range(0, len(order), size)[own.process_index :: own.num_processes]
    found: list[tuple[int, list[tuple[str, bool]]]] = []
    with whole_base(model):
        for start in tqdm(starts, desc="generating", leave=False):
            chosen = order[start : start + size]
            completions = complete(
                model,
                [encoded[i] for i in chosen],
                ends=ends,
                max_new_tokens=limit,
                samples=max(1, samples),
                temperature=1.0 if samples else None,
                draws=draws[chosen].flatten(0, 1) if samples else None,
            )
            written = tokenizer.batch_decode(completions, skip_special_tokens=True)
            cut = [tokens[-1] not in ends for tokens in completions]
            each = list(zip(written, cut, strict=True))
            found += [(i, each[row * max(1, samples) :][: max(1, samples)]) for row, i in enumerate(chosen)]
    return [completions for _, completions in sorted(gather_object(found))]
