"""GSM8K and MMLU with the prompts, filters and metrics of `lm-eval` (paper, section 4).

Deviation: every GSM8K prompt shows the first worked examples of the training split, so that all prompts share a prefix,
which is read once. `lm-eval` draws new examples for each question.
"""

import logging
from collections import defaultdict
from importlib.resources import files

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from lorapar_utils import data
from lorapar_utils.errors import InputError
from lorapar_utils.settings import Settings

HUB = {"gsm8k": (data.HUB["gsm8k"], data.HUB_CONFIG["gsm8k"]), "mmlu": ("cais/mmlu", "all")}
FEWSHOT_SPLIT = {"gsm8k": "train", "mmlu": "dev"}
# lm-eval warns when it is given a loaded model or custom data. We do both on purpose.
logging.getLogger("lm_eval").setLevel(logging.ERROR)


def score_harness(lm: HFLM, benchmark: str, settings: Settings) -> list[dict]:
    """Outcomes of GSM8K or MMLU, one per question.

    Parameters
    ----------
    lm
        `LeanLM(pretrained=model, tokenizer=tokenizer, batch_size=…)`, or `lm-eval`'s own `HFLM` with equal results.
    benchmark
        `gsm8k`: completions. The harness's filter `strict-match` (number after `####`) gives `correct`, and
        `flexible-extract` (last number) gives `flexible`. `mmlu`: `correct` if the right letter is the likeliest.
    settings
        `evaluation.gsm8k` or `evaluation.mmlu`: data folder, number of examples in a prompt, number of items.

    Returns
    -------
    list of dict
        `id`, `task` (`gsm8k`, or the subject), `correct`, `completion`, `truncated`; for GSM8K also `flexible`.
        `truncated` is None for letters, and for completions by `HFLM` itself.

    Raises
    ------
    InputError
        A missing folder, a malformed row, an answer key out of range, too few examples for the prompt.
    """
    tasks = benchmark_tasks(benchmark, settings)
    # `lm-eval` also accepts loaded task objects, keyed by task name.
    samples = run_harness(lm, {"tasks": tasks, "groups": {}}, bootstrap_iters=0, log_samples=True)["samples"]
    items = []
    for name, task in tasks.items():
        by_filter = defaultdict(dict)
        for sample in samples[name]:
            by_filter[sample["filter"]][sample["doc_id"]] = sample
        truncated = {instance.doc_id: getattr(instance, "truncated", None) for instance in task.instances}
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
            items.append(item | {"truncated": truncated[number]})
    return items


def benchmark_tables(benchmark: str, settings: Settings) -> dict[str, datasets.Dataset]:
    """Worked examples and test split of the benchmark, from the hub or a folder, with every row checked."""
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
    """Task name -> task, defined by the harness's own files over the benchmark's data."""
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
    splits = datasets.DatasetDict({shots: tables[shots], "test": test})
    changes = {
        "custom_dataset": lambda **_: splits,
        "num_fewshot": section.shots,
        "fewshot_split": shots,
        "fewshot_config": {"sampler": "first_n"},
    }
    config = load_yaml(str(path)) | changes
    if config["output_type"] == "generate_until":
        config["generation_kwargs"] = config["generation_kwargs"] | {"max_gen_toks": section.max_new_tokens}
    return ConfigurableTask(config=config)


def _check_choices(row: dict) -> None:
    for column in ("question", "subject"):
        data.text_of(row, column)
    if not isinstance(row.get("choices"), list) or len(row["choices"]) != 4:
        raise data.BadRow(f"choices = {row.get('choices')!r} are not four")
    if row.get("answer") not in (0, 1, 2, 3):
        raise data.BadRow(f"answer = {row.get('answer')!r} is not one of 0, 1, 2, 3")
