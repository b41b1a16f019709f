"""Which rows of a public data set train, validate and test: none does two of these, and each system has its share.

An example here is a dict with `prompt` and `system` (1 or 2 by construction, 0 where its source does not tell).
"""

import hashlib
import re
import unicodedata
from collections import Counter
from functools import partial

from lorapar_utils.errors import InputError
from lorapar_utils.settings import PoolSection

SPLITS = ("train", "validation", "test")
# Dashes that editors put for the keyboard's, quotes, slashes, the marks of sentences in other scripts, and controls.
PLAIN_MARKS = str.maketrans(
    dict.fromkeys("‐‑‒–—−", "-")
    | dict.fromkeys('"`´″“”„«»‹›¿¡', None)
    | dict.fromkeys("′‘’‚‛", "'")
    | dict.fromkeys("⁄∕", "/")
    | dict.fromkeys([*range(0x09), *range(0x0E, 0x1C), 0x7F], None)
    | dict(zip("。।۔、،؛؟", "...,,;?", strict=True))
)
AROUND = "*_()[]' \t\r\n"  # around the whole; inside they may be a product, a power, a point
# Not the point of .5, the points of 1..5, the sign of 1:2 nor the factorial of n!
SENTENCE_MARKS = re.compile(
    r"(?<![\d.,;:?])[.,;:?]{2,}|[.,;:?]{2,}(?![\d.,;:?])"
    r"|(?<=[^\W\d_]{2})[.,;:!?]+(?!\d)|(?<=[^\W\d_])[.,;:?]+(?!\d)|[.,;:?](?=\s|$)|(?<=\s)[.,;:?](?!\d)"
)
LABEL = re.compile(r"^\s*(?:q|question|problem)\s*[.:]\s*")
LINE_BREAK = re.compile(r"<br\s*/?>|\\n")


def without_repeats(examples: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Every question once: in the test split before validation, in validation before training.

    What is left out is counted in a printed line.
    """
    first_split: dict[str, str] = {}
    repeats: Counter[tuple[str, str]] = Counter()
    kept = {}
    for split in reversed(SPLITS):
        kept[split] = []
        for example in examples[split]:
            question = normalised(example["prompt"])
            if question in first_split:
                repeats[split, first_split[question]] += 1
            else:
                first_split[question] = split
                kept[split].append(example)
    if repeats:
        counts = [f"{count} of {split} that repeat {first}" for (split, first), count in repeats.items()]
        print(f"pool: left out {', '.join(counts)}")
    return kept


def normalised(prompt: str) -> str:
    """The question without case, layout, accents, quotes, and the marks of a sentence: what two copies of it share.

    Signs between numbers stay, and points and spaces: they tell 3 - 4 from 3 + 4, 1.5 from 15, and 1 5 from both.
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
    """Wide letters, ligatures and accented letters as plain ones, without what takes no room.

    A raised or lowered sign stays, since 10² is not 102, and so does a mark over a digit or a sign, since ≠ is not =.
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
    """Whether it is an accent or a Hebrew or Arabic point; marks that spell a vowel or a voiced sound are none."""
    place = unicodedata.combining(sign)
    return 10 <= place <= 35 or place >= 200


def assign_splits(examples: dict[str, list[dict]], pool: PoolSection, field: str) -> list[dict]:
    """The sizes of `pool.system1` and `pool.system2`, system by system, as far as there are examples.

    The source's own test and validation rows stay what they are; what it has none of is drawn from its training rows.
    What is drawn goes by each row's prompt, not by its place: with a row more or less the others keep their split, all
    but the few that fill its place.
    With fewer rows than asked for, all that is drawn from them shrinks in proportion. The sizes are printed.

    Parameters
    ----------
    examples
        By the split of the source, each question once.
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
    if not any(example["system"] for example in examples["train"]):
        sizes = {split: {0: sum(size.values())} for split, size in sizes.items()}
    parts = {}
    for source in SPLITS:
        # Held-out rows are drawn first, so that they stay the same when more are asked for to train on.
        drawn = [split for split in reversed(SPLITS) if split == source or (source == "train" and not examples[split])]
        wanted = {split: sizes[split] for split in drawn}
        rows = examples[source]
        if rows:
            parts |= _draw(sorted(rows, key=partial(_lot, pool.seed)), wanted)
        total = sum(sum(size.values()) for size in wanted.values())
        if len(rows) < total and len(drawn) > 1:
            print(f"pool: {len(rows)} rows for {_listed(drawn)}, {total} asked for: shared in proportion")
    _say_sizes(parts, sizes, pool, field)
    return [example | {"split": split} for split in SPLITS for example in parts[split]]


def _lot(seed: int, example: dict) -> str:
    return hashlib.sha256(f"{seed} {example['prompt']}".encode()).hexdigest()


def _draw(rows: list[dict], sizes: dict[str, dict[int, int]]) -> dict[str, list[dict]]:
    """As many rows of each system as each split asks for, from the front.

    A system with too few shares them among the splits in proportion; the other fills the splits up as far as it can.
    """
    strata = {system: [] for size in sizes.values() for system in size}
    for number, row in enumerate(rows):
        strata[row["system"]].append(number)
    taken = {split: [] for split in sizes}
    lacking = {split: sum(size.values()) for split, size in sizes.items()}

    def take(system: int, wanted: dict[str, int]) -> None:
        for split, share in _shares(len(strata[system]), wanted).items():
            taken[split] += strata[system][:share]
            del strata[system][:share]
            lacking[split] -= share

    for system in strata:
        take(system, {split: size[system] for split, size in sizes.items()})
    for system in strata:
        take(system, lacking)
    return {split: [rows[number] for number in sorted(numbers)] for split, numbers in taken.items()}


def _shares(available: int, wanted: dict[str, int]) -> dict[str, int]:
    """What is wanted, or parts of what is available in proportion to it, by the largest remainder."""
    total = sum(wanted.values())
    if total <= available:
        return dict(wanted)
    shares = {split: available * size // total for split, size in wanted.items()}
    by_remainder = sorted(wanted, key=lambda split: available * wanted[split] % total, reverse=True)
    for split in by_remainder[: available - sum(shares.values())]:
        shares[split] += 1
    return shares


def _say_sizes(parts: dict[str, list[dict]], sizes: dict[str, dict[int, int]], pool: PoolSection, field: str) -> None:
    """One line of what each split has; one for each thing that is not as asked for."""
    counts = {split: Counter(example["system"] for example in examples) for split, examples in parts.items()}
    told = []
    for split in SPLITS:
        total, wanted = len(parts[split]), sum(sizes[split].values())
        systems = ", ".join(f"System {system}: {counts[split][system]}" for system in sizes[split] if system)
        short = f" of {wanted} asked for" if total < wanted else ""
        told.append(f"{split} {total}{short}" + (f" ({systems})" if systems else ""))
    summary = f"{pool.source}: {'; '.join(told)}"
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
