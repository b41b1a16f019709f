import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapar_utils.errors import InputError
from lorapar_utils.partition import REGIONS, Partition, build_partition, random_partition

values = st.lists(st.floats(0, 1e3, width=32), min_size=2, max_size=40).filter(lambda v: max(v) > 0)
thetas = st.floats(0.01, 1.0)
shares = st.floats(0.0, 1.0)


@st.composite
def score_pairs(draw):
    first = draw(values)
    second = draw(
        st.lists(st.floats(0, 1e3, width=32), min_size=len(first), max_size=len(first)).filter(lambda v: max(v) > 0)
    )
    half = len(first) // 2
    return tuple({"a": torch.tensor(v[:half]), "b": torch.tensor(v[half:])} for v in (first, second))


def by_rows(scores, theta):
    """The paper's rule, row by row."""
    if theta == 1.0:
        return set(range(len(scores)))
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    total = 0.0
    for i in order:
        total += scores[i]
    reached, chosen = 0.0, set()
    for i in order:
        chosen.add(i)
        reached += scores[i]
        if reached >= theta * total:
            break
    return chosen


@given(score_pairs(), thetas)
@settings(max_examples=200, deadline=None)
def test_selection_equals_the_row_loop(pair, theta):
    built = build_partition(*pair, theta=theta)
    for scores, selected in zip(pair, (built.selected1, built.selected2), strict=True):
        flat = torch.cat(list(scores.values())).double().tolist()
        assert set(selected.nonzero().squeeze(1).tolist()) == by_rows(flat, theta)


@given(score_pairs(), thetas, shares, shares)
@settings(max_examples=200, deadline=None)
def test_regions_are_disjoint_and_complete_and_counts_exact(pair, theta, alpha, beta):
    built = build_partition(*pair, theta=theta, alpha=alpha, beta=beta)
    regions = built.regions()
    assert tuple(regions) == REGIONS
    assert torch.stack(list(regions.values())).int().sum(0).eq(1).all()
    shared = int(regions["shared"].sum())
    assert int(built.active1.sum()) == int(regions["system1_only"].sum()) + round(alpha * shared)
    assert int(built.active2.sum()) == int(regions["system2_only"].sum()) + round(beta * shared)
    assert not (built.active1 & ~built.selected1).any() and not (built.active2 & ~built.selected2).any()


@given(score_pairs(), thetas, thetas)
@settings(max_examples=100, deadline=None)
def test_nested_in_theta(pair, theta, other):
    small, large = (build_partition(*pair, theta=t) for t in sorted((theta, other)))
    assert not (small.selected1 & ~large.selected1).any()


@given(score_pairs(), thetas, st.sampled_from([0.25, 2.0, 1024.0]))
@settings(max_examples=100, deadline=None)
def test_invariant_to_scale(pair, theta, factor):
    tiny = [values[values > 0].min() for scores in pair for values in scores.values() if (values > 0).any()]
    if min(tiny) < 1e-30:
        return
    scaled = {name: values * factor for name, values in pair[0].items()}
    before, after = build_partition(*pair, theta=theta), build_partition(scaled, pair[1], theta=theta)
    assert torch.equal(before.selected1, after.selected1)


@given(score_pairs(), thetas)
@settings(max_examples=50, deadline=None)
def test_random_control_has_equal_counts(pair, theta):
    built = build_partition(*pair, theta=theta)
    control = random_partition(built, seed=3)
    assert control.active1.sum() == built.active1.sum() and control.active2.sum() == built.active2.sum()
    assert control.jaccard == built.jaccard


def test_saves_and_loads(tmp_path):
    scores = {
        "layers.0.q_proj.lora_A.default.weight": torch.rand(3, 5),
        "layers.1.v_proj.lora_B.default.weight": torch.rand(7, 3),
    }
    built = build_partition(scores, {k: torch.rand_like(v) for k, v in scores.items()}, theta=0.6, alpha=0.5)
    loaded = Partition.load(built.save(tmp_path / "p"))
    for stage in (1, 2):
        for name, mask in built.stage_mask(stage).items():
            assert mask.shape == scores[name].shape and torch.equal(loaded.stage_mask(stage)[name], mask)
    assert loaded.parameters == built.parameters
    summary = built.summary()
    assert summary["layer"].tolist() == [0, 1] and summary["matrix"].tolist() == ["A", "B"]
    (tmp_path / "p" / "masks.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="build it again"):
        Partition.load(tmp_path / "p")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"theta": 0.0}, r"theta = 0.0: must lie in \(0, 1\]"),
        ({"theta": 1.2}, "theta = 1.2"),
        ({"theta": 0.5, "alpha": -0.1}, "alpha = -0.1"),
        ({"theta": 0.5, "beta": 2}, "beta = 2"),
    ],
)
def test_values_out_of_range_are_named(change, message):
    scores = {"a": torch.ones(4)}
    with pytest.raises(InputError, match=message):
        build_partition(scores, scores, **change)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(4), "every score is 0"),
        (torch.tensor([1.0, float("nan"), 0, 0]), "NaN"),
        (-torch.ones(4), "negative"),
    ],
)
def test_unusable_scores_are_named(bad, message):
    with pytest.raises(InputError, match=f"system2: .*{message}"):
        build_partition({"a": torch.ones(4)}, {"a": bad}, theta=0.5)
