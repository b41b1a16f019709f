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
    assert not asked and row["calls"] == 4 and row["already answered"] == 2
    assert row["completion tokens, at most"] == 400 and row["completion tokens, likely"] == 28
    prompts = row["prompt tokens, about"]
    assert prompts == round(4 * len("What is 0?") / 4)
    assert row["cost, at most"] == round((prompts + 800) / 1e6, 4)


def test_a_teacher_that_always_abstains_is_stopped_early(cache):
    pool = datasets.Dataset.from_list([{"id": f"e{i}", "prompt": f"{i}", "answer": str(i)} for i in range(100)])
    asked = []
    mute = teacher("mute", lambda a: Ballot(system=0, reason="empty answer", text="hm"), asked)
    with pytest.raises(InputError, match=r"'mute' abstained on all of its 16 examples \(16 times: empty answer\)"):
        vote(pool, [mute], cache)
    assert len(asked) == 16


def test_bad_votes_are_named(pool, cache):
    with pytest.raises(InputError, match="voting.teachers: the list is empty"):
        vote(pool, [], cache)
    with pytest.raises(InputError, match="teacher 'a': a margin is NaN"):
        vote(pool, [teacher("a", lambda a: float("nan"), [])], cache)
    twice = datasets.concatenate_datasets([pool, pool])
    with pytest.raises(InputError, match="ids repeat"):
        vote(twice, [teacher("b", lambda a: 1.0, [])], cache)
