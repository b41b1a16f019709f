import dataclasses
import errno
import threading
import time

import datasets
import diskcache
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorapar_utils.errors import InputError
from lorapar_utils.voting import Ballot, Teacher, decide, plan, vote


@pytest.fixture
def pool():
    return datasets.Dataset.from_list([{"id": f"e{i}", "prompt": f"What is {i}?", "answer": str(i)} for i in range(6)])


@pytest.fixture
def cache(tmp_path):
    with diskcache.Cache(tmp_path, disk=diskcache.JSONDisk) as opened:
        yield opened


def teacher(name, rule, asked, **options):
    """`rule(answer)` is a margin, or a Ballot."""

    def ask(examples, answered):
        for i, example in enumerate(examples):
            asked.append(example["answer"])
            found = rule(example["answer"])
            answered(i, found if isinstance(found, Ballot) else Ballot(margin=found))

    return Teacher(name, f"key-{name}", lambda example: example["prompt"], ask, **options)


def test_majority_and_quorum(pool, cache):
    asked = []
    teachers = [teacher(n, lambda a, t=t: float(a) - t, asked) for n, t in zip("abc", (0.5, 2.5, 4.5), strict=True)]
    voted = vote(pool, teachers, cache, calibration="none")
    assert voted["system"] == [1, 1, 1, 2, 2, 2]
    assert voted["votes"][1] == [2, 1, 1] and voted["agreement"][1] == pytest.approx(2 / 3)
    strict = vote(pool, teachers, cache, calibration="none", quorum=3)
    assert strict["system"] == [1, 0, 0, 0, 0, 2]
    assert len(asked) == 18


votes_tables = st.integers(1, 6).flatmap(
    lambda n: st.lists(st.lists(st.sampled_from([0, 1, 2]), min_size=n, max_size=n), min_size=1, max_size=8)
)


@given(votes_tables, st.sampled_from([None, "undecided", "system1", "system2"]), st.integers(1, 6))
def test_decide_equals_counting_by_hand(table, tie, quorum):
    systems, agreement = decide(np.array(table), quorum=quorum, tie=tie)
    for votes, system, share in zip(table, systems, agreement, strict=True):
        ones, twos = votes.count(1), votes.count(2)
        if ones == twos:
            expected = int(tie[-1]) if tie in ("system1", "system2") and ones else 0
        else:
            expected = (1 if ones > twos else 2) if max(ones, twos) >= quorum else 0
        assert system == expected
        assert share == (max(ones, twos) / (ones + twos) if ones + twos else 0)


def test_nothing_is_asked_twice_and_an_interrupted_run_keeps_its_answers(pool, cache):
    asked = []

    def fails_late(answer):
        if len(asked) > 4:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        vote(pool, [teacher("a", fails_late, asked)], cache)
    done = set(asked[:4])
    asked.clear()
    vote(pool, [teacher("a", lambda a: 1.0, asked)], cache)
    assert set(asked) == {str(i) for i in range(6)} - done


def test_a_failed_call_abstains_now_and_is_asked_again(pool, cache):
    asked = []
    down = Ballot(system=0, reason="no answer within 1 s", final=False)
    voted = vote(pool, [teacher("a", lambda a: down if a == "3" else Ballot(system=1), asked)], cache)
    assert voted["votes"][3] == [0] and voted["reasons"][3] == ["no answer within 1 s"] and voted["system"][3] == 0
    asked.clear()
    voted = vote(pool, [teacher("a", lambda a: Ballot(system=2), asked)], cache)
    assert asked == ["3"] and voted["system"] == [1, 1, 1, 2, 1, 1]


def test_an_answer_that_was_cut_off_is_asked_again_under_a_higher_limit_only(pool, cache):
    asked = []

    def answers(limit):
        cut = Ballot(system=0, reason="reached max_tokens", text="It", limit=limit)
        return teacher("a", lambda a: cut if int(a) > limit else Ballot(system=2), asked, max_tokens=limit)

    for limit, expected in ((3, "012345"), (3, ""), (2, ""), (4, "45"), (3, ""), (9, "5")):
        vote(pool, [answers(limit)], cache)
        assert "".join(asked) == expected, limit
        asked.clear()


def test_a_question_is_asked_once_however_many_teachers_and_examples_have_it(pool, cache):
    asked = []
    one, other = (teacher(name, lambda a: Ballot(system=2), asked, max_tokens=9) for name in ("a", "b"))
    other = dataclasses.replace(other, key=one.key)
    twins = datasets.concatenate_datasets([pool, pool.map(lambda row: {"id": f"again-{row['id']}"})])
    assert plan(twins, [one, other], cache)["to ask"].tolist() == [6, 0]
    assert vote(twins, [one, other], cache)["votes"] == [[2, 2]] * 12
    assert asked == list("012345")


def test_nothing_is_asked_before_every_teacher_is_checked_and_what_costs_nothing_comes_first(pool, cache):
    asked, order = [], []

    def rule(name):
        return lambda answer: order.append(name) or Ballot(system=1)

    def in_vain():
        raise InputError("no key")

    paid = teacher("paid", rule("paid"), asked, max_tokens=9)
    free = teacher("free", rule("free"), asked)
    with pytest.raises(InputError, match="no key"):
        vote(pool, [paid, free, dataclasses.replace(free, name="c", key="c", check=in_vain)], cache)
    unwritten = dataclasses.replace(free, prompt=lambda example: in_vain() if example["id"] == "e5" else "?")
    with pytest.raises(InputError, match="no key"):
        vote(pool, [paid, unwritten], cache)
    assert not asked
    voted = vote(pool, [paid, free], cache, tie="undecided")
    assert order == ["free"] * 6 + ["paid"] * 6 and voted["votes"] == [[1, 1]] * 6
    # What is answered needs no server.
    assert vote(pool, [dataclasses.replace(paid, check=in_vain)], cache)["votes"] == [[1]] * 6


def test_abstentions_are_left_out_of_the_count(pool, cache):
    silent = Ballot(system=0, reason="empty answer")
    teachers = [
        teacher("a", lambda a: Ballot(system=2), []),
        teacher("b", lambda a: Ballot(system=2) if a == "0" else silent, []),
        teacher("c", lambda a: Ballot(system=1), []),
    ]
    voted = vote(pool, teachers, cache, tie="system1")
    assert voted["system"] == [2, 1, 1, 1, 1, 1] and voted["agreement"][1] == 0.5


def test_pool_calibration_removes_a_constant_leaning(pool, cache):
    voted = vote(pool, [teacher("a", lambda a: 100.0 + float(a), [])], cache, calibration="pool")
    assert voted["system"] == [1, 1, 1, 2, 2, 2]


def test_content_free_calibration_subtracts_the_empty_margin(pool, cache):
    rule = teacher("a", lambda a: 2.5 if a == "N/A" else float(a), [])
    assert vote(pool, [rule], cache, calibration="content-free")["system"] == [1, 1, 1, 2, 2, 2]


def test_the_dry_run_counts_what_is_missing_and_asks_nothing(pool, cache):
    asked = []
    paid = teacher("a", lambda a: Ballot(system=1, tokens_out=7), asked, price_in=1.0, price_out=2.0, max_tokens=100)
    vote(pool.select(range(2)), [paid], cache)
    asked.clear()
    row = plan(pool, [paid], cache).iloc[0]
    assert not asked and row["to ask"] == 4 and row["already answered"] == 2
    assert row["completion tokens, at most"] == 400 and row["completion tokens, likely"] == 28
    prompts = row["prompt tokens, about"]
    assert prompts == round(4 * len("What is 0?") / 4)
    assert row["cost at most, in the prices' currency"] == round((prompts + 800) / 1e6, 4)


def test_a_teacher_that_always_abstains_is_stopped_early(cache):
    pool = datasets.Dataset.from_list([{"id": f"e{i}", "prompt": f"{i}", "answer": str(i)} for i in range(100)])
    asked = []
    mute = teacher("mute", lambda a: Ballot(system=0, reason="empty answer", text="hm"), asked)
    with pytest.raises(InputError, match=r"'mute' abstained on all of its 16 examples \(16 times: empty answer\)"):
        vote(pool, [mute], cache)
    assert len(asked) == 16


def test_a_server_that_always_fails_is_stopped_early_and_not_blamed_on_the_teacher(cache):
    pool = datasets.Dataset.from_list([{"id": f"e{i}", "prompt": f"{i}", "answer": str(i)} for i in range(100)])
    asked = []
    down = Ballot(system=0, reason="no answer within 1 s", final=False)
    with pytest.raises(
        InputError, match=r"'a': no vote yet, .*failed on 16 of 16 examples .*no answer within.*run again"
    ):
        vote(pool, [teacher("a", lambda a: down, asked)], cache)
    assert len(asked) == 16
    mixed = teacher("b", lambda a: down if a == "3" else Ballot(system=0, reason="empty answer", text="hm"), asked)
    with pytest.raises(InputError, match="failed on 1 of 6 examples .* and it abstained on the others"):
        vote(pool.select(range(6)), [mixed], cache)
    assert set(vote(pool, [teacher("a", lambda a: Ballot(system=2), asked)], cache)["system"]) == {2}


def test_refusals_are_kept_of_a_server_that_answers_too(pool, cache):
    asked = []
    refused = Ballot(system=0, reason="refused: 400")
    with pytest.raises(InputError, match="abstained on all of its 6 examples .*refused: 400"):
        vote(pool, [teacher("a", lambda a: refused, asked)], cache)
    mended = teacher("a", lambda a: refused if a in "13" else Ballot(system=2), asked)
    for expected in (12, 12):
        assert vote(pool, [mended], cache)["votes"] == [[2], [0], [2], [0], [2], [2]]
        assert len(asked) == expected


@pytest.mark.parametrize("locks", [True, False], ids=["file locks", "no file locks"])
def test_two_that_vote_at_once_on_one_cache_ask_each_question_once(pool, tmp_path, monkeypatch, locks):
    def no_locks(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    if not locks:
        monkeypatch.setattr("lorapar_utils.machine.FileLock.acquire", no_locks)
    asked, tables = [], []

    def slow(answer):
        time.sleep(0.05)
        return Ballot(system=2)

    def run():
        with diskcache.Cache(tmp_path, disk=diskcache.JSONDisk) as cache:
            tables.append(vote(pool, [teacher("a", slow, asked)], cache)["votes"])

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tables == [[[2]] * 6] * 2 and sorted(asked) == list("012345")


def test_a_refusal_is_kept_once_a_later_question_is_answered(pool, cache):
    asked = []
    refused = Ballot(system=0, reason="refused: 400")
    voted = vote(pool, [teacher("a", lambda a: refused if a in "145" else Ballot(system=2), asked)], cache)
    assert voted["failed"] == [0, 0, 0, 0, 1, 1]
    asked.clear()
    assert sum(vote(pool, [teacher("a", lambda a: Ballot(system=2), asked)], cache)["failed"]) == 0
    assert asked == ["4", "5"]


def test_bad_votes_are_named(pool, cache):
    with pytest.raises(InputError, match="voting.teachers: the list is empty"):
        vote(pool, [], cache)
    with pytest.raises(InputError, match="teacher 'a': a margin is NaN"):
        vote(pool, [teacher("a", lambda a: float("nan"), [])], cache)
    twice = datasets.concatenate_datasets([pool, pool])
    with pytest.raises(InputError, match="ids repeat"):
        vote(twice, [teacher("b", lambda a: 1.0, [])], cache)
