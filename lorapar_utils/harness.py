"""GSM8K and MMLU by `lm-eval`: its prompts, filters and metrics, with the model asked in less time (paper, section 4).

Deviation: the worked examples of a GSM8K prompt are the first of the training split for every question, where `lm-eval`
draws others for each, so that what all prompts begin with is read once.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.resources import files

import datasets
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm.auto import tqdm

from lorapar_utils import data
from lorapar_utils.encoding import end_tokens
from lorapar_utils.errors import InputError
from lorapar_utils.generation import complete, has_virtual_tokens, next_token_logits
from lorapar_utils.settings import Settings

HUB = {"gsm8k": (data.HUB["gsm8k"], data.HUB_CONFIG["gsm8k"]), "mmlu": ("cais/mmlu", "all")}
FEWSHOT_SPLIT = {"gsm8k": "train", "mmlu": "dev"}
# It warns of a model that is passed to it and of data that is its own: both are meant here.
logging.getLogger("lm_eval").setLevel(logging.ERROR)


class LeanLM(HFLM):
    """`lm-eval`'s model with the same answers for less work.

    What the prompts of a batch begin with is read once, and a sequence leaves its batch as it ends. Requests that this
    does not cover (drawn completions, choices of several tokens, virtual tokens) are left to `HFLM`.
    """

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = [normalize_gen_kwargs(dict(request.args[1]), self.max_gen_toks) for request in requests]
        if has_virtual_tokens(self.model) or any(kwargs.get("do_sample") for kwargs in asked):
            return super().generate_until(requests, disable_tqdm)
        results = [""] * len(requests)
        ends = end_tokens(self.model, self.tokenizer)
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        for chosen in tqdm(self._batches(requests), desc="generating", leave=False, disable=disable_tqdm):
            first = asked[chosen[0]]
            room, stop = first["max_gen_toks"], handle_stop_sequences(list(first["until"]), eos=end)
            prompts = [self.tok_encode(requests[i].args[0])[room - self.max_length :] for i in chosen]
            ended = _EndsWith(stop, self.tokenizer)
            completions = complete(self.model, prompts, ends=ends, max_new_tokens=room, stopped=ended)
            for i, tokens in zip(chosen, completions, strict=True):
                text = self.tok_decode(tokens)
                results[i] = postprocess_generated_text(text, stop, None)
                requests[i].truncated = tokens[-1] not in ends and not ended(tokens)
        return results

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [self._encode_pair(*request.args) if request.args[0] else ([], []) for request in requests]
        if has_virtual_tokens(self.model) or any(len(continuation) != 1 for _, continuation in pairs):
            return super().loglikelihood(requests, disable_tqdm)
        results = [(0.0, False)] * len(requests)
        # The choices of a question have one context: it is read once.
        same = defaultdict(list)
        for i, (context, _) in enumerate(pairs):
            same[tuple(context[-self.max_length :])].append(i)
        first = {indices[0]: context for context, indices in same.items()}
        batches = self._batches([requests[i] for i in first], list(first))
        for chosen in tqdm(batches, desc="log-likelihoods", leave=False, disable=disable_tqdm):
            contexts = [first[i] for i in chosen]
            for context, logits in zip(contexts, next_token_logits(self.model, contexts), strict=True):
                logprobs = torch.log_softmax(logits, -1, dtype=self.softmax_dtype)
                likeliest = logits.argmax().item()
                for i in same[context]:
                    [token] = pairs[i][1]
                    results[i] = (logprobs[token].item(), token == likeliest)
        return results

    def _batches(self, requests: Sequence[Instance], indices: Iterable[int] | None = None) -> list[list[int]]:
        """Indices in batches: of one task, whose prompts begin alike, and sorted by length."""
        of_task = defaultdict(list)
        for i, request in zip(indices or range(len(requests)), requests, strict=True):
            of_task[request.task_name].append((len(request.args[0]), i))
        batches = []
        for found in of_task.values():
            order = [i for _, i in sorted(found)]
            batches += [order[k : k + self.batch_size] for k in range(0, len(order), self.batch_size)]
        return batches


class _EndsWith:
    """Whether one of some strings stands at the end of a completion's tokens."""

    def __init__(self, strings: Sequence[str], tokenizer):
        self.strings = strings
        self.tokenizer = tokenizer
        # A string can be spelt by other tokens than the tokenizer's own, as in `MultiTokenEOSCriteria` of `lm-eval`.
        self.longest = 2 + max(len(tokenizer.encode(s, add_special_tokens=False)) for s in strings)

    def __call__(self, tokens: list[int]) -> bool:
        tail = self.tokenizer.decode(tokens[-self.longest :])
        return any(string in tail for string in self.strings)


def score_harness(lm: HFLM, benchmark: str, settings: Settings) -> list[dict]:
    """Outcomes of GSM8K or MMLU, one a question.

    Parameters
    ----------
    lm
        `LeanLM(pretrained=model, tokenizer=tokenizer, batch_size=…)`, or `lm-eval`'s own `HFLM`: they agree.
    benchmark
        `gsm8k`: completions, `correct` by the harness's filter `strict-match` (the number after `####`), `flexible` by
        `flexible-extract` (the last number). `mmlu`: `correct` where the right letter is the likeliest of the four.
    settings
        `evaluation.gsm8k` or `evaluation.mmlu`: where the data is, how many examples a prompt shows, how many items.

    Returns
    -------
    list of dict
        `id`, `task` (`gsm8k`, or the subject), `correct`, `completion`, `truncated`; for GSM8K also `flexible`.
        `truncated` is None where nobody noted it: for letters, and where `HFLM` itself completes.

    Raises
    ------
    InputError
        A missing folder, a malformed row, an answer key out of range, too few examples for the prompt.
    """
    tasks = benchmark_tasks(benchmark, settings)
    # The key that `lm-eval` wants beside its own names is the task's.
    found = run_harness(lm, {"tasks": tasks, "groups": {}}, bootstrap_iters=0, log_samples=True)["samples"]
    items = []
    for name, task in tasks.items():
        by_filter = defaultdict(dict)
        for sample in found[name]:
            by_filter[sample["filter"]][sample["doc_id"]] = sample
        cut = {instance.doc_id: getattr(instance, "truncated", None) for instance in task.instances}
        for number in range(len(task.eval_docs)):
            item = {"id": f"{name}/{number}", "task": name.removeprefix("mmlu_")}
            if benchmark == "mmlu":
                sample = by_filter["none"][number]
                likely = [float(response[0]) for response in sample["filtered_resps"]]
                item |= {"completion": "ABCD"[likely.index(max(likely))], "correct": bool(sample["acc"])}
            else:
                strict, loose = (by_filter[key][number] for key in ("strict-match", "flexible-extract"))
                item |= {"completion": strict["resps"][0][0], "correct": bool(strict["exact_match"])}
                item |= {"flexible": bool(loose["exact_match"])}
            items.append(item | {"truncated": cut[number]})
    return items


def benchmark_tables(benchmark: str, settings: Settings) -> dict[str, datasets.Dataset]:
    """The benchmark's worked examples and its test split, from the hub or a folder, each row checked."""
    section = getattr(settings.evaluation, benchmark)
    repository, config = HUB[benchmark]
    field = f"evaluation.{benchmark}.path"
    shots, test = FEWSHOT_SPLIT[benchmark], "test"
    check = data.from_gsm8k if benchmark == "gsm8k" else _check_choices
    tables = data.read_tables(field, section.path, repository, config, splits=(shots, test), check=check)
    for split in (shots, test):
        if split not in tables:
            raise InputError(f"{field}: {section.path} has no split {split!r}; put {repository}'s files there")
    return tables


def benchmark_tasks(benchmark: str, settings: Settings) -> dict[str, ConfigurableTask]:
    """The harness's own task definitions over the benchmark's data."""
    section, tables = getattr(settings.evaluation, benchmark), benchmark_tables(benchmark, settings)
    shots, test = FEWSHOT_SPLIT[benchmark], "test"
    if benchmark == "gsm8k":
        return {"gsm8k": _task("gsm8k/gsm8k.yaml", tables, shots, section)}
    subjects = dict.fromkeys(tables[test]["subject"])
    return {
        f"mmlu_{subject}": _task(
            f"mmlu/default/mmlu_{subject}.yaml",
            {split: tables[split].filter(lambda row, s=subject: row["subject"] == s) for split in (shots, test)},
            shots,
            section,
        )
        for subject in subjects
    }


def _task(definition: str, tables, shots: str, section) -> ConfigurableTask:
    path = files("lm_eval") / "tasks" / definition
    if not path.is_file():
        raise InputError(f"evaluation.mmlu: lm-eval knows no task {definition!r}; check the column `subject`")
    test = tables["test"] if section.items is None else tables["test"].take(min(section.items, len(tables["test"])))
    if len(tables[shots]) < section.shots:
        raise InputError(
            f"evaluation: shots = {section.shots} of {definition}, but its data has {len(tables[shots])}; ask for fewer"
        )
    held = datasets.DatasetDict({shots: tables[shots], "test": test})
    changes = {
        "custom_dataset": lambda **_: held,
        "num_fewshot": section.shots,
        "fewshot_split": shots,
        "fewshot_config": {"sampler": "first_n"},
    }
    wanted = load_yaml(str(path)) | changes
    if wanted["output_type"] == "generate_until":
        wanted["generation_kwargs"] = wanted["generation_kwargs"] | {"max_gen_toks": section.max_new_tokens}
    return ConfigurableTask(config=wanted)


def _check_choices(row: dict) -> None:
    for column in ("question", "subject"):
        data.text_of(row, column)
    if not isinstance(row.get("choices"), list) or len(row["choices"]) != 4:
        raise data.BadRow(f"choices = {row.get('choices')!r} are not four")
    if row.get("answer") not in (0, 1, 2, 3):
        raise data.BadRow(f"answer = {row.get('answer')!r} is not one of 0, 1, 2, 3")
