"""The teacher that is the target itself: what it gets wrong is slow."""

import math

import pytest

from lorapar_utils import data
from lorapar_utils.errors import InputError
from lorapar_utils.settings import load_profile
from lorapar_utils.voting import success, teachers

OWN = {"name": "own", "kind": "success", "completions": 3, "max_new_tokens": 4}


@pytest.fixture
def settings(saved_model):
    voting = {"teachers": [OWN], "panels": {}, "panel": None, "batch_size": 6}
    return load_profile("smoke", model={"source": str(saved_model), "dtype": "float32"}, voting=voting)


def margins(settings, rows):
    [own] = teachers.build_teachers(settings, rows)
    ballots = {}
    own.ask(rows, ballots.__setitem__)
    return [ballots[i].margin for i in range(len(rows))]


def test_the_share_of_wrong_completions_is_the_margin(settings, monkeypatch):
    rows = [{"id": str(i), "prompt": f"t{i}", "answer": "t5"} for i in range(4)]
    right_of = {"t0": 3, "t1": 2, "t2": 0, "t3": 1}

    def completions(model, prompts, **_):
        groups = [right_of[f"t{next(i for i in reversed(ids) if i < 4)}"] for ids in prompts]
        return [[5 if k < right else 9] for right in groups for k in range(3)]

    monkeypatch.setattr(success, "complete", completions)
    assert margins(settings, rows) == pytest.approx(
        [math.log((3 - right + 0.5) / (right + 0.5)) for right in right_of.values()]
    )


def test_a_vote_does_not_depend_on_what_else_is_asked(settings):
    rows = [row for row in data.load_pool(settings) if row["split"] == "train"][:5]
    together = margins(settings, rows)
    assert [margins(settings, [row])[0] for row in rows] == together
    assert all(map(math.isfinite, together))


def test_free_text_is_refused(settings, tmp_path):
    with pytest.raises(InputError, match="own: kind = 'success' needs answers that can be checked, .* dolly-15k"):
        teachers.build_teachers(settings.changed(pool={"source": "dolly-15k"}), [])
