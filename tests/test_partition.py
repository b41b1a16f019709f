import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapar_utils.errors import InputError
from lorapar_utils.partition import (
    Partition,
    build_partition,
    largest_partition,
    random_in_matrix_partition,
    random_partition,
    random_stage2_partition,
    swapped_partition,
)

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
    for scores, selected in zip(pair, built.selected, strict=True):
        flat = torch.cat(list(scores.values())).double().tolist()
        assert set(selected.nonzero().squeeze(1).tolist()) == by_rows(flat, theta)


@given(score_pairs(), thetas, shares, shares)
@settings(max_examples=200, deadline=None)
def test_regions_are_disjoint_and_complete_and_counts_exact(pair, theta, alpha, beta):
    built = build_partition(*pair, theta=theta, alpha=alpha, beta=beta)
    regions = built.regions()
    assert tuple(regions) == ("system1_only", "system2_only", "shared", "inactive")
    assert torch.stack(list(regions.values())).int().sum(0).eq(1).all()
    shared = int(regions["shared"].sum())
    assert int(built.active[0].sum()) == int(regions["system1_only"].sum()) + round(alpha * shared)
    assert int(built.active[1].sum()) == int(regions["system2_only"].sum()) + round(beta * shared)
    assert not (built.active[0] & ~built.selected[0]).any() and not (built.active[1] & ~built.selected[1]).any()


@given(score_pairs(), thetas, thetas)
@settings(max_examples=100, deadline=None)
def test_nested_in_theta(pair, theta, other):
    small, large = (build_partition(*pair, theta=t) for t in sorted((theta, other)))
    assert not (small.selected[0] & ~large.selected[0]).any()


@given(score_pairs(), thetas, st.sampled_from([0.25, 2.0, 1024.0]))
@settings(max_examples=100, deadline=None)
def test_invariant_to_scale(pair, theta, factor):
    tiny = [values[values > 0].min() for scores in pair for values in scores.values() if (values > 0).any()]
    if min(tiny) < 1e-30:
        return
    scaled = {name: values * factor for name, values in pair[0].items()}
    before, after = build_partition(*pair, theta=theta), build_partition(scaled, pair[1], theta=theta)
    assert torch.equal(before.selected[0], after.selected[0])


@given(score_pairs(), thetas)
@settings(max_examples=50, deadline=None)
def test_random_control_has_equal_counts(pair, theta):
    built = build_partition(*pair, theta=theta)
    control = random_partition(built, seed=3)
    assert control.active[0].sum() == built.active[0].sum() and control.active[1].sum() == built.active[1].sum()
    assert control.jaccard == built.jaccard


@given(score_pairs(), thetas)
@settings(max_examples=50, deadline=None)
def test_random_control_within_matrices_has_equal_counts_in_every_matrix(pair, theta):
    built = build_partition(*pair, theta=theta, alpha=0.5)
    control = random_in_matrix_partition(built, seed=3)
    assert control.jaccard == built.jaccard and control.parameters["selection"] == "random_in_matrix"
    for stage in (1, 2):
        counts = [{name: int(m.sum()) for name, m in p.stage_mask(stage).items()} for p in (built, control)]
        assert counts[0] == counts[1]


def test_random_controls_differ_from_importance_and_from_seed_to_seed():
    scores = [{name: torch.rand(40, 20) ** 4 for name in ("a", "b")} for _ in range(2)]
    built = build_partition(*scores, theta=0.5)
    for make in (random_partition, random_in_matrix_partition):
        first, second = (make(built, seed) for seed in (0, 1))
        assert not torch.equal(first.active[0], built.active[0])
        assert not torch.equal(first.active[0], second.active[0])
        assert torch.equal(first.active[0], make(built, 0).active[0])


@given(score_pairs(), thetas)
@settings(max_examples=50, deadline=None)
def test_control_by_magnitude_takes_the_largest_values_in_equal_number(pair, theta):
    built = build_partition(*pair, theta=theta)
    values = {name: scores.flip(0) for name, scores in pair[0].items()}
    control = largest_partition(built, values)
    flat = torch.cat([v.flatten() for v in values.values()])
    for mask, wanted in zip(control.active, built.active, strict=True):
        assert mask.sum() == wanted.sum()
        if not mask.all():
            assert flat[mask].min() >= flat[~mask].max()


def test_control_of_stage_2_alone_leaves_stage_1_as_it_is():
    scores = [{"a": torch.rand(30, 20)} for _ in range(2)]
    built = build_partition(*scores, theta=0.6, beta=0.5)
    control = random_stage2_partition(built, seed=1)
    assert torch.equal(control.stage_mask(1)["a"], built.stage_mask(1)["a"])
    assert control.active[1].sum() == built.active[1].sum() and not torch.equal(control.active[1], built.active[1])


def test_swapped_control_trains_the_other_systems_elements_in_each_stage():
    scores = [{"a": torch.rand(30, 20)} for _ in range(2)]
    built = build_partition(*scores, theta=0.6)
    swapped = swapped_partition(built)
    assert torch.equal(swapped.stage_mask(1)["a"], built.stage_mask(2)["a"])
    assert torch.equal(swapped.stage_mask(2)["a"], built.stage_mask(1)["a"])
    assert swapped.jaccard == built.jaccard and swapped.parameters["selection"] == "swapped"


@given(st.data(), thetas)
@settings(max_examples=100, deadline=None)
def test_more_than_two_systems(data, theta):
    size = data.draw(st.integers(2, 12))
    one = st.lists(st.floats(0, 1e3, width=32), min_size=size, max_size=size).filter(lambda v: max(v) > 0)
    systems = [{"a": torch.tensor(data.draw(one))} for _ in range(data.draw(st.integers(3, 5)))]
    built = build_partition(*systems, theta=theta)
    regions = built.regions()
    assert torch.stack(list(regions.values())).int().sum(0).eq(1).all()
    for k, scores in enumerate(systems, start=1):
        assert set(built.selected[k - 1].nonzero().squeeze(1).tolist()) == by_rows(scores["a"].double().tolist(), theta)
        assert torch.equal(built.stage_mask(k)["a"], built.selected[k - 1])
    pair = build_partition(*systems[:2], theta=theta)
    assert all(torch.equal(a, b) for a, b in zip(pair.selected, built.selected, strict=False))


@pytest.mark.parametrize("theta", [0.1, 0.5, 0.9, 0.999])
def test_selection_over_many_magnitudes_equals_sorting(theta):
    """Scores like real ones: a million, over twelve orders of magnitude, a third of them equal."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.exp(6 * torch.randn(1_000_000, generator=generator)) * 1e-9
    scores[::3] = scores[3]
    scores[1::7] = 0
    built = build_partition({"a": scores}, {"a": scores.flip(0)}, theta=theta, alpha=0.3)
    order = torch.argsort(scores, descending=True, stable=True)
    reached = scores[order].double().cumsum(0)
    count = int((reached < theta * reached[-1]).sum()) + 1
    expected = torch.zeros(len(scores), dtype=torch.bool)
    expected[order[:count]] = True
    assert torch.equal(built.selected[0], expected)
    shared = built.regions()["shared"]
    by_score = order[shared[order]][: round(0.3 * int(shared.sum()))]
    assert set(by_score.tolist()) == set((built.active[0] & shared).nonzero().squeeze(1).tolist())


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
    assert all(map(torch.equal, loaded.selected, built.selected)) and loaded.parameters == built.parameters
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
