"""Split the rows of a public data set into train, validation and test, without overlap and by system.

An example here is a dict with `prompt` and `construction` (the system that it was made for: 1 or 2, 0 if unknown).
"""

import hashlib
import re
import unicodedata
from collections import Counter
from functools import partial

from lorapar_utils.errors import InputError
from lorapar_utils.settings import PoolSection

SPLITS = ("train", "validation", "test")
# Typographic dashes, quotes and slashes, punctuation of other scripts, and control characters.
PLAIN_MARKS = str.maketrans(
    dict.fromkeys("‐‑‒–—−", "-")
    | dict.fromkeys('"`´″“”„«»‹›¿¡', None)
    | dict.fromkeys("′‘’‚‛", "'")
    | dict.fromkeys("⁄∕", "/")
    | dict.fromkeys([*range(0x09), *range(0x0E, 0x1C), 0x7F], None)
    | dict(zip("。।۔、،؛؟", "...,,;?", strict=True))
)
AROUND = "*_()[]' \t\r\n"  # stripped at the ends only; inside they may be a product, a power, a point
# Punctuation, except the point of .5, the points of 1..5, the colon of 1:2 and the factorial of n!
SENTENCE_MARKS = re.compile(
    r"(?<![\d.,;:?])[.,;:?]{2,}|[.,;:?]{2,}(?![\d.,;:?])"
    r"|(?<=[^\W\d_]{2})[.,;:!?]+(?!\d)|(?<=[^\W\d_])[.,;:?]+(?!\d)|[.,;:?](?=\s|$)|(?<=\s)[.,;:?](?!\d)"
)
LABEL = re.compile(r"^\s*(?:q|question|problem)\s*[.:]\s*")
LINE_BREAK = re.compile(r"<br\s*/?>|\\n")


def without_repeats(examples: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Keep each question once: in test before validation, in validation before training.

    The number of dropped examples is printed.
    """
    first_split: dict[str, str] = {}
    repeats: Counter[tuple[str, str]] = Counter()
    examples_of = {}
    for split in reversed(SPLITS):
        examples_of[split] = []
        for example in examples[split]:
            question = normalised(example["prompt"])
            if question in first_split:
                repeats[split, first_split[question]] += 1
            else:
                first_split[question] = split
                examples_of[split].append(example)
    if repeats:
        counts = [f"{count} of {split} that repeat {first}" for (split, first), count in repeats.items()]
        print(f"pool: left out {', '.join(counts)}")
    return examples_of


def normalised(prompt: str) -> str:
    """The question without case, layout, accents, quotes and sentence punctuation, equal for copies of one question.

    Signs, points and spaces between numbers stay, because 3 - 4 is not 3 + 4, and 1.5 is neither 15 nor 1 5.
    """
    plain = LINE_BREAK.sub(" ", prompt).casefold()
    if not plain.isascii():
        plain = _plain_signs(plain).casefold()
    plain = LABEL.sub("", plain.translate(PLAIN_MARKS))
    plain = re.sub(r"(?<=[^\W\d_]{2})(?:'(?=[^\W\d_])|'(?=\s|$))", "", plain)
    plain = re.sub(r"(?<=[^\W\d_]{2})\s*-+\s*(?=[^\W\d_]{2})", " ", plain)
    plain = re.sub(r"(?<=\d)\s+:\s+(?=\d)", ":", plain)  # a ratio
    plain = SENTENCE_MARKS.sub(" ", plain)
    words = " ".join(plain.strip(AROUND).split())
    return re.sub(r"(?<!\d) | (?![-+.]?\d)", "", words)


def _plain_signs(text: str) -> str:
    """Replace wide letters, ligatures and accented letters by plain ones; drop characters of no width.

    A raised or lowered sign stays, because 10² is not 102. A mark over a digit or sign stays, because ≠ is not =.
    """
    signs: list[str] = []
    for sign in unicodedata.normalize("NFC", text):
        category, kind = unicodedata.category(sign), unicodedata.decomposition(sign).split(" ")[0]
        if sign.isspace():
            signs.append(" ")
        elif category in ("Cf", "Cc") or "\ufe00" <= sign <= "\ufe0f":  # joiners, direction marks, variation selectors
            continue
        elif kind in ("<super>", "<sub>"):
            signs.append(sign)
        elif kind == "<fraction>":
            signs.append(f" {unicodedata.normalize('NFKC', sign)} ")  # 1½ is not 11/2
        elif category == "Nd":
            signs.append(str(unicodedata.decimal(sign)))
        elif category[0] == "L":
            signs += [part for part in unicodedata.normalize("NFKD", sign) if not _is_accent(part)]
        elif not (_is_accent(sign) and signs and signs[-1].isalpha()):
            signs.append(sign if sign.isdigit() else unicodedata.normalize("NFKC", sign))
    return "".join(signs)


def _is_accent(sign: str) -> bool:
    """Whether `sign` is an accent or a Hebrew or Arabic point; marks that spell a vowel or voiced sound are not."""
    place = unicodedata.combining(sign)
    return 10 <= place <= 35 or place >= 200


def assign_splits(examples: dict[str, list[dict]], pool: PoolSection, field: str) -> list[dict]:
    """Assign a split to the examples, in the sizes of `pool.system1` and `pool.system2`.

    Test and validation rows of the source keep their split. A split that the source lacks is drawn from the training
    rows. The draw depends on a hash of each row's prompt, not on its position, so adding or removing a row changes the
    split of only a few others. If rows are too few, all splits drawn from them shrink in proportion. The sizes are
    printed.

    Parameters
    ----------
    examples
        By the split of the source, without repeated questions.
    field
        The setting that named the source, for messages.

    Returns
    -------
    list of dict
        The examples with `split`; the same for the same `pool.seed`.

    Raises
    ------
    InputError
        A split would be empty.
    """
    if not examples["train"]:
        held_out = ", ".join(f"{split} {len(examples[split])}" for split in SPLITS[1:])
        raise InputError(
            f"{field}: {pool.source} has no row to train on (rows held out: {held_out}); add a file train.jsonl, or "
            "name the one file to draw all splits from"
        )
    sizes = {split: {1: getattr(pool.system1, split), 2: getattr(pool.system2, split)} for split in SPLITS}
    if not any(example["construction"] for example in examples["train"]):
        sizes = {split: {0: sum(size.values())} for split, size in sizes.items()}
    parts = {}
    for source in SPLITS:
        # Held-out rows are drawn first, so that they stay the same when the training split grows.
        drawn = [split for split in reversed(SPLITS) if split == source or (source == "train" and not examples[split])]
        asked = {split: sizes[split] for split in drawn}
        rows = examples[source]
        if rows:
            parts |= _draw(sorted(rows, key=partial(_lot, pool.seed)), asked)
        total = sum(sum(size.values()) for size in asked.values())
        if len(rows) < total and len(drawn) > 1:
            print(f"pool: {len(rows)} rows for {_listed(drawn)}, {total} asked for: shared in proportion")
    _say_sizes(parts, sizes, pool, field)
    return [example | {"split": split} for split in SPLITS for example in parts[split]]


def _lot(seed: int, example: dict) -> str:
    return hashlib.sha256(f"{seed} {example['prompt']}".encode()).hexdigest()


def _draw(rows: list[dict], sizes: dict[str, dict[int, int]]) -> dict[str, list[dict]]:
    """The rows of each split: as many of each system as `sizes` says, from the front.

    If a system has too few rows, the splits get them in proportion, and rows of the other system fill the gap.
    """
    strata = {system: [] for size in sizes.values() for system in size}
    for number, row in enumerate(rows):
        strata[row["construction"]].append(number)
    numbers_of = {split: [] for split in sizes}
    lacking = {split: sum(size.values()) for split, size in sizes.items()}

    def take(system: int, counts: dict[str, int]) -> None:
        for split, share in _shares(len(strata[system]), counts).items():
            numbers_of[split] += strata[system][:share]
            del strata[system][:share]
            lacking[split] -= share

    for system in strata:
        take(system, {split: size[system] for split, size in sizes.items()})
    for system in strata:
        take(system, lacking)
    return {split: [rows[number] for number in sorted(numbers)] for split, numbers in numbers_of.items()}


def _shares(available: int, sizes: dict[str, int]) -> dict[str, int]:
    """`sizes`, or `available` rows in proportion to `sizes` by the largest remainder if they exceed it."""
    total = sum(sizes.values())
    if total <= available:
        return dict(sizes)
    shares = {split: available * size // total for split, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda split: available * sizes[split] % total, reverse=True)
    for split in by_remainder[: available - sum(shares.values())]:
        shares[split] += 1
    return shares


def _say_sizes(parts: dict[str, list[dict]], sizes: dict[str, dict[int, int]], pool: PoolSection, field: str) -> None:
    """Print the size of each split, and a line for each system with too few rows."""
    counts = {split: Counter(example["construction"] for example in examples) for split, examples in parts.items()}
    texts = []
    for split in SPLITS:
        total, size = len(parts[split]), sum(sizes[split].values())
        systems = ", ".join(f"System {system}: {counts[split][system]}" for system in sizes[split] if system)
        short = f" of {size} asked for" if total < size else ""
        texts.append(f"{split} {total}{short}" + (f" ({systems})" if systems else ""))
    summary = f"{pool.source}: {'; '.join(texts)}"
    if empty := [split for split in SPLITS if not parts[split]]:
        raise InputError(
            f"{field}: too few rows, none is left for {_listed(empty)}: {summary}; lower pool.system1 and "
            "pool.system2, or add rows"
        )
    print(f"pool: {summary}")
    for system, other in ((1, 2), (2, 1)):
        filled = [split for split in SPLITS if other in sizes[split] and counts[split][other] > sizes[split][other]]
        if filled:
            print(f"pool: too few rows of System {system} for {_listed(filled)}: System {other} fills up")
        if missing := [split for split in SPLITS if system in sizes[split] and not counts[split][system]]:
            print(f"pool: no row of System {system} in {_listed(missing)}")


def _listed(splits: list[str]) -> str:
    return ", ".join(split for split in SPLITS if split in splits)
