"""Teachers vote every example into System 1 or System 2; votes are cached, counted and decided (paper, section 3.1).

Module `teachers` has the kinds of teacher and their requests.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import datasets
import diskcache
import numpy as np
from filelock import Timeout
from tqdm.auto import tqdm

from lorapar_utils.cache import fingerprint
from lorapar_utils.errors import InputError
from lorapar_utils.machine import lock

CONTENT_FREE = {"prompt": "N/A", "answer": "N/A"}
# A teacher that never answers is stopped after so many calls, before the whole pool is paid for.
PROBATION = 16


@dataclass(frozen=True)
class Ballot:
    """One teacher's answer for one example.

    `system` is 1, 2, or 0 for an abstention with a `reason`. For a teacher with margins it is None, because the vote
    follows from the `margin` (log-odds of System 2) after calibration. `final` is False for a failed call, which counts
    as an abstention and is asked again by the next run. `limit` is the token limit that cut an answer off; a run with a
    higher limit asks again. `certain` marks a refusal that is surely about the question: by a content filter, or of a
    prompt that is too long.
    """

    system: int | None = None
    margin: float | None = None
    reason: str = ""
    text: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    final: bool = True
    limit: int | None = None
    certain: bool = False


def _nothing_to_check() -> None:
    pass


@dataclass(frozen=True)
class Teacher:
    """A teacher with a name.

    `key` hashes everything but the prompt that shapes the answers; the cache keeps ballots under key and prompt. A key
    of None means no caching. `ask(examples, answered)` calls `answered(i, ballot)` for each answer, in any order.
    `check()` raises InputError if asking must fail. `max_tokens` is 0 for a teacher that costs nothing.
    """

    name: str
    key: str | None
    prompt: Callable[[dict], str]
    ask: Callable[[Sequence[dict], Callable[[int, Ballot], None]], None]
    price_in: float = 0.0
    price_out: float = 0.0
    max_tokens: int = 0
    check: Callable[[], None] = _nothing_to_check


def vote(
    pool: datasets.Dataset,
    teachers: Sequence[Teacher],
    cache: diskcache.Cache,
    *,
    calibration: str = "pool",
    quorum: int | None = None,
    tie: str | None = None,
) -> datasets.Dataset:
    """Ask every teacher about every example once, and count the votes.

    Before the first question, all prompts are rendered and all teachers checked. Teachers that cost nothing are asked
    first. Teachers with equal keys share their answers.

    Parameters
    ----------
    pool
        Rows with `id`, `prompt`, `answer`.
    teachers
        At least one.
    cache
        Keeps each ballot on arrival, so that an interrupted run asks only the missing questions. If several processes
        share the cache, one at a time asks a teacher, and the others wait and read the answers.
    calibration
        Subtracted from a teacher's margins: `pool`, the mean over the pool; `content-free`, the margin of an
        empty example; `none`, nothing.
    quorum, tie
        See `decide`.

    Returns
    -------
    datasets.Dataset
        The pool's columns and, per example: `votes` (list of 1 | 2, 0 = abstained), `reasons` (of abstentions, else
        ""), `failed` (number of failed calls), `margin_NAME` of each teacher that has them (calibrated; log-odds of
        System 2), `system` (1 | 2 | 0 = undecided), `agreement` (share of the more frequent system among the
        votes cast).

    Raises
    ------
    InputError
        No teacher, duplicate ids, a margin that is not finite, a teacher that abstains on all examples, a server that
        fails on all calls.
    """
    if not teachers:
        raise InputError("voting.teachers: the list is empty; name at least one")
    if len(set(pool["id"])) != len(pool):
        raise InputError("pool: example ids repeat; give every example its own id")
    examples = list(pool)
    columns: dict[str, list] = {}
    keys = [keys_of(teacher, examples) for teacher in teachers]
    for teacher, own_keys in zip(teachers, keys, strict=True):
        if any(kept_ballot(teacher, key, cache) is None for key in own_keys):
            teacher.check()
    polled: dict[int, list[Ballot]] = {}
    for number in sorted(range(len(teachers)), key=lambda number: teachers[number].max_tokens > 0):
        polled[number] = _ballots(teachers[number], examples, keys[number], cache)
    votes, reasons, failed = [], [], []
    for number, teacher in enumerate(teachers):
        ballots = polled[number]
        if ballots[0].margin is not None:
            margins = _calibrated(teacher, ballots, cache, calibration)
            columns[f"margin_{teacher.name}"] = margins.tolist()
            votes.append(np.where(margins > 0, 2, 1))
        else:
            votes.append(np.array([ballot.system for ballot in ballots]))
        reasons.append([ballot.reason for ballot in ballots])
        failed.append([not ballot.final for ballot in ballots])
    table = np.stack(votes, axis=1)
    system, agreement = decide(table, quorum=quorum, tie=tie)
    columns |= {"votes": table.tolist(), "reasons": [list(row) for row in zip(*reasons, strict=True)]}
    columns |= {"failed": np.sum(failed, axis=0).tolist()}
    columns |= {"system": system.tolist(), "agreement": agreement.tolist()}
    return datasets.Dataset.from_list(
        [example | {key: values[i] for key, values in columns.items()} for i, example in enumerate(examples)]
    )


def decide(votes: np.ndarray, *, quorum: int | None = None, tie: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Each example's system, and the teachers' agreement.

    Parameters
    ----------
    votes
        Examples x teachers; 1, 2, or 0 for an abstention.
    quorum
        Number of votes that the larger side needs; None stands for more than half of the teachers.
    tie
        The decision if both systems have equally many votes, at least one: `system1`, `system2`, `undecided` or None.

    Returns
    -------
    (systems, agreement)
        1 | 2 | 0 (undecided: a tie, or no quorum), and the larger side's share of the votes cast (0 without any).
    """
    ones, twos = (votes == 1).sum(1), (votes == 2).sum(1)
    larger = np.maximum(ones, twos)
    has_quorum = larger >= (votes.shape[1] // 2 + 1 if quorum is None else quorum)
    system = np.select([(ones > twos) & has_quorum, (twos > ones) & has_quorum], [1, 2], 0)
    if tie in ("system1", "system2"):
        system[(ones == twos) & (ones > 0)] = int(tie[-1])
    return system, larger / np.maximum(ones + twos, 1)


def _ballots(
    teacher: Teacher, examples: Sequence[dict], keys: Sequence[str | None], cache: diskcache.Cache
) -> list[Ballot]:
    """The teacher's ballot on every example, from the cache if possible."""
    known = _known(teacher, keys, cache)
    if len(known) < len(examples):
        with _asking_alone(teacher, cache):
            _ask(teacher, examples, keys, known := _known(teacher, keys, cache), cache)
    ballots = [known[i] for i in range(len(examples))]
    _refuse_silence(teacher, ballots)
    return ballots


@contextlib.contextmanager
def _asking_alone(teacher: Teacher, cache: diskcache.Cache) -> Iterator[None]:
    """Keep other processes from asking this teacher, because they would pay for the same answers."""
    if teacher.key is None:
        yield
        return
    file = Path(cache.directory) / f"{teacher.key}.lock"
    try:
        file_lock = lock(file, timeout=0)
    except Timeout:
        print(f"teacher {teacher.name}: another process is asking it; this one waits for the answers", flush=True)
        file_lock = lock(file)
    with file_lock:
        yield


def _ask(
    teacher: Teacher,
    examples: Sequence[dict],
    keys: Sequence[str | None],
    known: dict[int, Ballot],
    cache: diskcache.Cache,
) -> None:
    """Ask for the ballots missing from `known`, and add them.

    Some servers report their own faults as bad requests. So a refusal is cached only if the server answered a question
    after it, and answered more questions than it refused. Otherwise it counts as a failed call. A refusal that
    is `certain` is cached as soon as the server has answered anything.
    """
    # Examples with equal prompts share one question.
    questions: dict[str | int, list[int]] = {}
    for i, key in enumerate(keys):
        if i not in known:
            questions.setdefault(i if key is None else key, []).append(i)
    if not questions:
        return
    members = list(questions.values())
    answers = sum(map(_is_answer, known.values()))
    refused: dict[int, Ballot] = {}  # by position, since the last answer
    passed_over: dict[int, Ballot] = {}  # refusals before the last answer
    certain: dict[int, Ballot] = {}  # before the first answer
    outcomes: Counter[bool] = Counter()  # answers (True) and failures
    with _progress(teacher, len(members)) as update:

        def keep(position: int, ballot: Ballot) -> None:
            cache[keys[members[position][0]]] = asdict(ballot)

        def answered(position: int, ballot: Ballot) -> None:
            nonlocal answers
            known.update(dict.fromkeys(members[position], ballot))
            if teacher.key is not None and _is_answer(ballot):
                if ballot.final:
                    keep(position, ballot)
                answers += 1
                passed_over.update(refused)
                refused.clear()
            elif teacher.key is not None and ballot.final:
                (certain if ballot.certain else refused)[position] = ballot
            while answers and certain:
                keep(*certain.popitem())
            update(ballot)
            outcomes[ballot.final] += 1
            if outcomes[ballot.final] == PROBATION:
                _refuse_silence(teacher, list(known.values()))

        try:
            teacher.ask([examples[same[0]] for same in members], answered)
        finally:
            if len(passed_over) + len(refused) > answers:
                refused |= passed_over
            else:
                for position, ballot in list(passed_over.items()):
                    keep(position, ballot)
    _refuse_silence(teacher, list(known.values()))
    for position, ballot in refused.items():
        known.update(dict.fromkeys(members[position], replace(ballot, final=False)))


def _known(teacher: Teacher, keys: Sequence[str | None], cache: diskcache.Cache) -> dict[int, Ballot]:
    return {i: ballot for i, key in enumerate(keys) if (ballot := kept_ballot(teacher, key, cache)) is not None}


def keys_of(teacher: Teacher, examples: Sequence[dict]) -> list[str | None]:
    """The key in the cache of each example's ballot; None for a teacher that is not cached."""
    if teacher.key is None:
        return [None] * len(examples)
    return [fingerprint([teacher.key, teacher.prompt(example)]) for example in examples]


def kept_ballot(teacher: Teacher, key: str | None, cache: diskcache.Cache) -> Ballot | None:
    """The answer cached under `key`; None if missing, or cut off under a lower limit than the teacher's."""
    fields = None if key is None else cache.get(key)
    if fields is None:
        return None
    ballot = Ballot(**fields)
    return None if ballot.limit is not None and ballot.limit < teacher.max_tokens else ballot


def _is_answer(ballot: Ballot) -> bool:
    """Whether the teacher answered, with or without a verdict; False for failed calls and the server's refusals."""
    return ballot.system != 0 or bool(ballot.text or ballot.tokens_out or ballot.limit)


def _refuse_silence(teacher: Teacher, ballots: Sequence[Ballot]) -> None:
    if any(ballot.system != 0 for ballot in ballots):
        return
    failures = [ballot for ballot in ballots if not ballot.final]
    (reason, count), *_ = Counter(ballot.reason for ballot in failures or ballots).most_common(1)
    if failures:
        others = "" if len(failures) == len(ballots) else " and it abstained on the others"
        raise InputError(
            f"teacher {teacher.name!r}: no vote yet, because its server failed on {len(failures)} of {len(ballots)} "
            f"examples ({count} times: {reason}){others}; no failure is kept as an answer: once the server is mended, "
            "run again, and those examples are asked again"
        )
    example = next((f"; for example it said {b.text[-200:]!r}" for b in ballots if b.text), "")
    raise InputError(
        f"teacher {teacher.name!r} abstained on all of its {len(ballots)} examples ({count} times: {reason}){example}; "
        "change its question, raise its max_tokens, or leave it out"
    )


@contextlib.contextmanager
def _progress(teacher: Teacher, total: int) -> Iterator[Callable[[Ballot], None]]:
    """A progress bar; for a teacher that costs something, with tokens and cost so far."""
    tokens = [0, 0]
    with tqdm(total=total, desc=f"teacher {teacher.name}", leave=False) as bar:

        def update(ballot: Ballot) -> None:
            tokens[0] += ballot.tokens_in
            tokens[1] += ballot.tokens_out
            if teacher.max_tokens:
                cost = (tokens[0] * teacher.price_in + tokens[1] * teacher.price_out) / 1e6
                bar.set_postfix({"tokens": f"{sum(tokens):,}", "cost": f"{cost:.4f}"}, refresh=False)
            bar.update(1)

        yield update


def _calibrated(teacher: Teacher, ballots: Sequence[Ballot], cache: diskcache.Cache, calibration: str) -> np.ndarray:
    margins = np.array([ballot.margin for ballot in ballots])
    if not np.isfinite(margins).all():
        raise InputError(f"teacher {teacher.name!r}: a margin is NaN or infinite; check its model's dtype")
    if calibration == "content-free":
        return margins - _ballots(teacher, [CONTENT_FREE], keys_of(teacher, [CONTENT_FREE]), cache)[0].margin
    return margins - (margins.mean() if calibration == "pool" else 0.0)
