import pytest

from lorapar_utils import rewards

SOLUTION = "1 + 2 = 3\n3 - 5 = -2\n#### -2"


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        (SOLUTION, "-2", 2.0),
        ("#### -2.0", "-2", 2.0),
        ("#### 1,200", "1200", 2.0),
        ("#### $1,200.", "1200", 2.0),
        ("#### 2", "-2", 0.0),
        ("-2", "-2", 0.0),
        ("####", "-2", 0.0),
        ("", "-2", 0.0),
        ("#### paris.", "Paris", 2.0),
        ("#### Parish", "Paris", 0.0),
        ("anything", None, None),
        ("anything", "  ", None),
    ],
)
def test_correctness(completion, reference, expected):
    assert rewards.correctness(completion, reference) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (SOLUTION, 0.5),
        ("#### 4", 0.5),
        ("#### 4\n#### 4", 0.0),
        ("#### 4\nso it is", 0.0),
        ("#### ", 0.0),
        ("4", 0.0),
        ("", 0.0),
    ],
)
def test_layout(completion, expected):
    assert rewards.layout(completion) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (SOLUTION, 1.0),
        ("1 + 2 = 3\n3 - 5 = 8\n#### 8", 0.5),
        ("1 + 2 = 4\n3 - 5 = -2\n#### -2", 0.0),
        ("3 - 5 = -2\n1 + 2 = 3", 0.0),
        ("", 0.0),
    ],
)
def test_step_share_counts_leading_right_steps(completion, expected):
    assert rewards.step_share(completion, SOLUTION) == expected


def test_step_share_without_steps_is_none():
    assert rewards.step_share("#### Paris", "#### Paris") is None
    assert rewards.step_share("x", None) is None


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        ("It is Paris.", "Paris", True),
        ("Parisian", "Paris", False),
        ("so 12", "2", False),
        ("so -2", "2", False),
        ("= 2.", "2", True),
    ],
)
def test_mentions_whole_words_and_numbers(completion, reference, expected):
    assert rewards.mentions(completion, reference) is expected
