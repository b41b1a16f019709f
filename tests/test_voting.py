import datasets
import diskcache
import pytest

from lorapar_utils.errors import InputError
from lorapar_utils.voting import Teacher, vote


@pytest.fixture
def pool():
    return datasets.Dataset.from_list([{"id": f"e{i}", "prompt": f"What is {i}?", "answer": str(i)} for i in range(6)])


@pytest.fixture
def cache(tmp_path):
    with diskcache.Cache(tmp_path, disk=diskcache.JSONDisk) as opened:
        yield opened


def teacher(name, rule, asked):
    def margins(examples):
        asked.extend(e["answer"] for e in examples)
        return [rule(e["answer"]) for e in examples]

    return Teacher(name, f"key-{name}", margins)


def test_majority_and_quorum(pool, cache):
    asked = []
    teachers = [
        teacher(n, lambda a, t=t: float(a) - t if a != "N/A" else 0.0, asked)
        for n, t in zip("abc", (0.5, 2.5, 4.5), strict=True)
    ]
    voted = vote(pool, teachers, cache, calibration="none", quorum=2)
    assert voted["system"] == [1, 1, 1, 2, 2, 2]
    assert voted["votes"][1] == [2, 1, 1] and voted["agreement"][1] == pytest.approx(2 / 3)
    strict = vote(pool, teachers, cache, calibration="none", quorum=3)
    assert strict["system"] == [1, 0, 0, 0, 0, 2]
    assert len(asked) == 18


def test_nothing_is_asked_twice_and_an_interrupted_run_keeps_its_answers(pool, cache):
    asked = []

    def fails_late(answer):
        if len(asked) > 4:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        vote(pool, [teacher("a", fails_late, asked)], cache, quorum=1, batch_size=2)
    done = set(asked[:4])
    asked.clear()
    vote(pool, [teacher("a", lambda a: 1.0, asked)], cache, quorum=1, batch_size=2)
    assert set(asked) == {str(i) for i in range(6)} - done


def test_pool_calibration_removes_a_constant_leaning(pool, cache):
    voted = vote(pool, [teacher("a", lambda a: 100.0 + float(a), [])], cache, calibration="pool", quorum=1)
    assert voted["system"] == [1, 1, 1, 2, 2, 2]


def test_bad_votes_are_named(pool, cache):
    with pytest.raises(InputError, match="voting.teachers: the list is empty"):
        vote(pool, [], cache)
    with pytest.raises(InputError, match="teacher 'a': a margin is NaN"):
        vote(pool, [teacher("a", lambda a: float("nan"), [])], cache, quorum=1)
    twice = datasets.concatenate_datasets([pool, pool])
    with pytest.raises(InputError, match="ids repeat"):
        vote(twice, [teacher("b", lambda a: 1.0, [])], cache, quorum=1)
