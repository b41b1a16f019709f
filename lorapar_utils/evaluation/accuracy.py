"""Accuracy on the pool, GSM8K, GSM-symbolic, MMLU and HumanEval: greedy, and sampled pass@k (paper, section 4)."""

import time
from collections.abc import Sequence
from functools import partial

from accelerate.utils import gather_object
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorapar_utils import data, distributed
from lorapar_utils.data import answers
from lorapar_utils.data.answers import answers_match, mentions
from lorapar_utils.data.encoding import answer_ids, end_tokens, prompt_ids
from lorapar_utils.errors import InputError
from lorapar_utils.evaluation.humaneval import check_allowed, score_humaneval
from lorapar_utils.fast.completions import complete, uniform
from lorapar_utils.fast.decoding import whole_base
from lorapar_utils.fast.label_scores import reply_log_probs
from lorapar_utils.records import Record, intervals, new_record
from lorapar_utils.records.intervals import Metric
from lorapar_utils.settings import Settings

# How many lines a completion has more than the solution -> what is said of its length.
LENGTHS = {
    "right_length": lambda surplus: surplus == 0,
    "too_short": lambda surplus: surplus < 0,
    "too_long": lambda surplus: surplus > 0,
}
BENCHMARKS = ("pool", "gsm8k", "gsm_symbolic", "mmlu", "humaneval")
# What outcomes of a benchmark other than the pool may have -> how it is averaged.
AVERAGES = {
    "truncated": intervals.proportion,
    "flexible": intervals.proportion,
    "lenient": intervals.proportion,
    "loss": intervals.mean,
}


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
        `pool` (by system, in the layout that training teaches; free text by overlap with the reference; always with
        the loss of the reference), `gsm_symbolic` (in the same way: word problems that no pool trains on), `gsm8k`
        (few-shot, generative) or `mmlu` (few-shot, likeliest of four letters) as `lm-eval` defines them, or `humaneval`
        (pass@1 of 164 problems; needs `evaluation.run_model_code`).
    split
        `test`, once, at the end. `validation`, which only the pool has, serves to choose settings.

    Returns
    -------
    Record
        `metrics` of `benchmark_metrics`; `items`, one outcome per example.
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
    """One outcome per example, as in `evaluate`: `id`, `task`, `completion`, `correct`, `truncated`, …"""
    if benchmark not in BENCHMARKS:
        raise InputError(f"benchmark: {benchmark!r} is not one of {', '.join(BENCHMARKS)}")
    if benchmark == "pool":
        examples = [row for row in data.load_pool(settings) if row["split"] == split]
        return score_pool(model, tokenizer, examples, settings)
    if split != "test":
        raise InputError(
            f"split = {split!r}: {benchmark} is scored on test only; choose settings on the pool's validation"
        )
    if benchmark == "gsm_symbolic":
        asked = settings.evaluation.gsm_symbolic
        settings = settings.changed(evaluation={"max_new_tokens": asked.max_new_tokens})
        return score_pool(model, tokenizer, data.gsm_symbolic(asked.items), settings)
    if benchmark == "humaneval":
        score = partial(score_humaneval, model, tokenizer, settings)
    else:
        # Here, because lm-eval takes seconds to import.
        from lm_eval.models.huggingface import HFLM

        from lorapar_utils.evaluation.benchmarks import score_harness
        from lorapar_utils.fast.lm_eval_model import LeanLM

        kind = LeanLM if "lm_eval_model" in settings.shortcuts else HFLM
        lm = kind(pretrained=model, tokenizer=tokenizer, batch_size=settings.evaluation.batch_size)
        score = partial(score_harness, lm, benchmark, settings)
    with whole_base(model):
        return distributed.by_first(score)


def check_benchmarks(settings: Settings) -> None:
    """Check that the data of `evaluation.benchmarks` is present, and that HumanEval may run code.

    Raises
    ------
    InputError
        The error that `evaluate` would raise, but before training.
    """
    for name in settings.evaluation.benchmarks:
        if name == "humaneval":
            check_allowed(settings)
        elif name != "gsm_symbolic":
            from lorapar_utils.evaluation.benchmarks import benchmark_tasks  # here, because lm-eval takes seconds

            benchmark_tasks(name, settings)


def benchmark_metrics(benchmark: str, items: Sequence[dict]) -> dict[str, Metric]:
    """Metrics of a benchmark's outcomes, each with n and a 95 % interval.

    The pool has those of `accuracy_metrics`. Others have `accuracy`, and `truncated` (completions without an end) if
    known. GSM8K adds `flexible` (the last number, in any layout), GSM-symbolic `lenient` and the `loss` of the
    reference solutions, MMLU `macro` (mean over subjects). HumanEval with k samples per problem adds the unbiased
    `pass@1` and `pass@k` over problems.
    """
    if benchmark == "pool":
        return accuracy_metrics(items)
    metrics = {"accuracy": intervals.proportion([item["correct"] for item in items])}
    for field, average in AVERAGES.items():
        if values := [item[field] for item in items if item.get(field) is not None]:
            metrics[field] = average(values)
    if benchmark == "mmlu":
        metrics["macro"] = intervals.macro_average([(item["task"], item["correct"]) for item in items])
    hits: dict[str, list[bool]] = {}
    for item in items:
        hits.setdefault(item["id"], []).append(item["correct"])
    for k in {1, len(items) // len(hits)} if len(hits) < len(items) else ():
        metrics[f"pass@{k}"] = intervals.mean([intervals.pass_at_k(sum(h), len(h), k) for h in hits.values()])
    return metrics


def accuracy_metrics(items: Sequence[dict]) -> dict[str, Metric]:
    """Metrics of the pool's outcomes, each with n and interval, over all items and by system if the system is known.

    `accuracy` (by system: `system1`, `system2`); `mentioned` (`mentioned1`, `mentioned2`): the share of completions
    that contain the answer anywhere, even outside the `####` layout; `lenient`; `right_length`, `too_short`,
    `too_long` and `up_to_surplus`, the shares by number of lines (see `compared_lines`); `truncated`; and the `loss`
    of the reference solutions, if measured. Free text has `overlap` in place of all but `truncated` and `loss`.
    """
    metrics = {}
    for system in (None, 1, 2):
        of_system = [item for item in items if system in (None, item["system"])]
        if losses := [item["loss"] for item in of_system if "loss" in item]:
            metrics[f"loss{system or ''}"] = intervals.mean(losses)
    items = [item for item in items if "completion" in item]
    if not items:
        return metrics
    metrics["truncated"] = intervals.proportion([item["truncated"] for item in items])
    if overlaps := [item["overlap"] for item in items if "overlap" in item]:
        return metrics | {"overlap": intervals.mean(overlaps)}
    for system, accuracy in ((None, "accuracy"), (1, "system1"), (2, "system2")):
        if of_system := [item for item in items if system in (None, item["system"])]:
            metrics[accuracy] = intervals.proportion([item["correct"] for item in of_system])
            for key in ("mentioned", "lenient", "up_to_surplus"):
                metrics[f"{key}{system or ''}"] = intervals.proportion([item[key] for item in of_system])
            for key, is_so in LENGTHS.items():
                metrics[f"{key}{system or ''}"] = intervals.proportion([is_so(item["surplus"]) for item in of_system])
    return metrics


def score_pool(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    settings: Settings,
) -> list[dict]:
    """Outcomes of `score_greedy`, each with the `loss` of the example's reference solution."""
    items = score_greedy(model, tokenizer, examples, settings)
    losses = solution_losses(model, tokenizer, examples, settings)
    return [item | {"loss": loss} for item, loss in zip(items, losses, strict=True)]


def score_greedy(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    settings: Settings,
) -> list[dict]:
    """One scored greedy completion per example: `{"id", "system", "task", "completion", "correct", "truncated"}`.

    Also `mentioned`: whether the answer appears anywhere in the completion; `lenient` (see `answers.leniently`);
    `surplus` and `up_to_surplus` (see `compared_lines`). Free text has `overlap` instead.
    """
    completions = generate(model, tokenizer, [e["prompt"] for e in examples], settings)
    items = []
    for example, [(text, truncated)] in zip(examples, completions, strict=True):
        item = {
            "id": example["id"],
            "system": example["construction"],
            "task": example["task"],
            "completion": text,
            "correct": is_correct(text, example["answer"], marked=not settings.has_free_text),
            "truncated": truncated,
        }
        if settings.has_free_text:
            item["overlap"] = answers.overlap(text, example["solution"])
        else:
            item["mentioned"] = mentions(text, example["answer"])
            item["lenient"] = answers.leniently(text, example["answer"])
            item |= compared_lines(text, example["solution"])
        items.append(item)
    return items


def compared_lines(completion: str, solution: str) -> dict:
    """How many lines a completion has more than the solution, and whether it is right up to what is superfluous.

    Returns
    -------
    dict
        `surplus`: lines before `####`, less those of the solution (negative if too few). `up_to_surplus`: whether its
        first lines are the solution's, so that only its end or its answer may be wrong; of a solution without lines,
        whether the answer is right.
    """
    given, wanted = (
        [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("####")]
        for text in (completion, solution)
    )
    answer = answers.extract_answer(solution)
    right = given[: len(wanted)] == wanted if wanted else is_correct(completion, answer or "", marked=True)
    return {"surplus": len(given) - len(wanted), "up_to_surplus": right}


def score_losses(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    settings: Settings,
) -> list[dict]:
    """The `loss` of each example's solution alone: `{"id", "system", "task", "loss"}`. It chooses settings."""
    losses = solution_losses(model, tokenizer, examples, settings)
    return [
        {"id": example["id"], "system": example["construction"], "task": example["task"], "loss": loss}
        for example, loss in zip(examples, losses, strict=True)
    ]


def solution_losses(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    settings: Settings,
) -> list[float]:
    """The loss of each example's solution and end token, in nats per token, as in stage 1 but never truncated."""
    pairs = [
        (prompt_ids(example["prompt"], tokenizer, settings), answer_ids(example["solution"], tokenizer))
        for example in examples
    ]
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    size = settings.evaluation.batch_size
    state = distributed.state()
    starts = range(0, len(order), size)[state.process_index :: state.num_processes]
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
        "pass@1": intervals.mean([intervals.pass_at_k(h, k, 1) for h in hits]),
        f"pass@{k}": intervals.mean([intervals.pass_at_k(h, k, k) for h in hits]),
    }


def is_correct(completion: str, reference: str, *, marked: bool = False) -> bool:
    """Whether the completion's final answer is the reference.

    Parameters
    ----------
    marked
        Only the text after `####` counts as an answer, as in pools that teach this layout. Otherwise a completion
        without `####` counts as an answer as a whole.
    """
    answer = answers.extract_answer(completion)
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
    """Completions of each prompt, in order: one greedy completion, or `samples` sampled at temperature 1.

    Under `accelerate launch` each process completes a share of the prompts, and every process returns all completions.

    Returns
    -------
    list of list of (text, truncated)
        `truncated` if the completion reached `evaluation.max_new_tokens` without an end token.
    """
    model.eval()
    encoded = [prompt_ids(prompt, tokenizer, settings) for prompt in prompts]
    ends = end_tokens(model, tokenizer)
    # Sorted by length, so that there is little padding.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    size = max(1, settings.evaluation.batch_size // max(1, samples))
    limit = settings.evaluation.max_new_tokens
    draws = uniform(len(encoded) * samples, limit, settings.seed).view(len(encoded), samples, limit)
    state = distributed.state()
    starts = range(0, len(order), size)[state.process_index :: state.num_processes]
    results: list[tuple[int, list[tuple[str, bool]]]] = []
    with whole_base(model):
        for start in tqdm(starts, desc="generating", leave=False):
            rows = order[start : start + size]
            completions = complete(
                model,
                [encoded[i] for i in rows],
                ends=ends,
                max_new_tokens=limit,
                samples=max(1, samples),
                temperature=1.0 if samples else None,
                draws=draws[rows].flatten(0, 1) if samples else None,
            )
            texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
            truncated = [tokens[-1] not in ends for tokens in completions]
            pairs = list(zip(texts, truncated, strict=True))
            results += [(i, pairs[k * max(1, samples) :][: max(1, samples)]) for k, i in enumerate(rows)]
    return [completions for _, completions in sorted(gather_object(results))]
