import copy

import pytest
import torch
from measure import Operators
from safetensors.torch import load_file, save_file

from lorapar_utils.errors import InputError
from lorapar_utils.optim import ActiveAdamW

OPTIONS = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def two_copies():
    torch.manual_seed(0)
    start = {"a": torch.randn(6, 5), "b": torch.randn(7), "c": torch.randn(3, 3)}
    masks = {name: torch.rand(v.shape) < 0.5 for name, v in start.items()}
    masks["c"] = torch.zeros(3, 3, dtype=torch.bool)
    copies = [{n: torch.nn.Parameter(v.clone()) for n, v in start.items()} for _ in range(2)]
    return start, masks, *copies


def run(parameters, optimizer, steps, clip=None):
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum(((i + 1 + step) * p.sin()).sum() for i, p in enumerate(parameters.values()) if p.requires_grad)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_([p for p in parameters.values() if p.grad is not None], clip)
        optimizer.step()


def test_active_elements_follow_adamw_and_inactive_ones_keep_every_bit():
    start, masks, ours, dense = two_copies()
    run(ours, ActiveAdamW(ours.items(), masks, **OPTIONS), 25)
    run(dense, torch.optim.AdamW(dense.values(), foreach=False, **OPTIONS), 25)
    for name, mask in masks.items():
        assert torch.equal(ours[name][~mask], start[name][~mask])
        assert torch.equal(ours[name][mask], dense[name][mask])
    assert not torch.equal(dense["c"], start["c"])


def test_long_vectors_follow_adamw_to_the_bit_wherever_gathering_puts_them():
    """Kernels work on several elements at once and on the rest one by one: both must round alike."""
    torch.manual_seed(1)
    start = {str(i): torch.randn(8, 129 + i) for i in range(5)}
    masks = {name: torch.rand(v.shape) < 0.4 for name, v in start.items()}
    ours, dense = ({n: torch.nn.Parameter(v.clone()) for n, v in start.items()} for _ in range(2))
    run(ours, ActiveAdamW(ours.items(), masks, **OPTIONS), 10)
    run(dense, torch.optim.AdamW(dense.values(), foreach=False, **OPTIONS), 10)
    assert all(torch.equal(ours[n][mask], dense[n][mask]) for n, mask in masks.items())
    assert all(torch.equal(ours[n][~mask], start[n][~mask]) for n, mask in masks.items())


def test_a_parameter_outside_the_loss_has_a_gradient_of_zero():
    _, masks, ours, dense = two_copies()
    for parameters, optimizer in (
        (ours, ActiveAdamW(ours.items(), masks, **OPTIONS)),
        (dense, torch.optim.AdamW(dense.values(), foreach=False, **OPTIONS)),
    ):
        for _ in range(3):
            optimizer.zero_grad()
            parameters["a"].sin().sum().backward()
            if parameters is dense:
                dense["b"].grad = torch.zeros_like(dense["b"])
            optimizer.step()
    assert all(torch.equal(ours[n][masks[n]], dense[n][masks[n]]) for n in "ab")


def test_clip_norm_counts_active_elements_only():
    start, masks, ours, _ = two_copies()
    active = {n: torch.nn.Parameter(start[n][m].clone()) for n, m in masks.items() if m.any()}
    run(ours, ActiveAdamW(ours.items(), masks, **OPTIONS), 5, clip=0.1)
    run(active, torch.optim.AdamW(active.values(), foreach=False, **OPTIONS), 5, clip=0.1)
    for name, values in active.items():
        torch.testing.assert_close(ours[name][masks[name]], values.data, rtol=1e-6, atol=1e-7)


def test_state_is_kept_for_active_elements_only_and_empty_matrices_need_no_gradient():
    _, masks, ours, _ = two_copies()
    optimizer = ActiveAdamW(ours.items(), masks, **OPTIONS)
    run(ours, optimizer, 1)
    assert optimizer.state_bytes() == 2 * 4 * sum(int(m.sum()) for m in masks.values())
    assert not ours["c"].requires_grad and ours["c"].grad is None


def test_a_step_takes_as_many_calls_for_one_matrix_as_for_sixty():
    names = {}
    for count in (1, 60):
        parameters = {str(i): torch.nn.Parameter(torch.randn(4, 5)) for i in range(count)}
        optimizer = ActiveAdamW(parameters.items(), {n: torch.rand(4, 5) < 0.5 for n in parameters}, **OPTIONS)
        run(parameters, optimizer, 1)
        with Operators() as calls:
            optimizer.step()
        names[count] = calls.names
    assert names[1] == names[60]
    assert names[1]["aten.index_select.default"] == 2 and names[1]["aten.index_copy_.default"] == 1


def test_parameters_that_were_given_other_memory_are_trained_there():
    start, masks, ours, expected = two_copies()
    optimizer = ActiveAdamW(ours.items(), masks, **OPTIONS)
    run(ours, optimizer, 2)
    ours["a"].data = ours["a"].data.clone()
    run(ours, optimizer, 2)
    straight = ActiveAdamW(expected.items(), masks, **OPTIONS)
    run(expected, straight, 2)
    run(expected, straight, 2)
    assert all(torch.equal(ours[name], expected[name]) for name in start)


def test_views_of_one_buffer_are_saved_like_tensors_of_their_own(tmp_path):
    start, masks, ours, _ = two_copies()
    ActiveAdamW(ours.items(), masks, **OPTIONS)
    save_file({name: p.detach() for name, p in ours.items()}, tmp_path / "views")
    save_file(start, tmp_path / "own")
    assert (tmp_path / "views").read_bytes() == (tmp_path / "own").read_bytes()
    assert load_file(tmp_path / "views").keys() == start.keys()


def test_resumes_exactly():
    _, masks, straight, resumed = two_copies()
    run(straight, ActiveAdamW(straight.items(), masks, **OPTIONS), 6)
    first = ActiveAdamW(resumed.items(), masks, **OPTIONS)
    run(resumed, first, 6)
    # Six steps twice from the same start agree; a state that round-trips continues alike.
    saved = copy.deepcopy(first.state_dict())
    second = ActiveAdamW(resumed.items(), masks, **OPTIONS)
    first.release()
    second.load_state_dict(saved)
    third = ActiveAdamW(straight.items(), masks, **OPTIONS)
    third.load_state_dict(copy.deepcopy(saved))
    run(resumed, second, 3)
    run(straight, third, 3)
    assert all(torch.equal(straight[n], resumed[n]) for n in straight)


def test_the_next_stages_optimizer_takes_the_gradients_over():
    """Also if nobody released the first one, whose hooks would hold back elements that only stage 2 trains."""
    _, masks, ours, _ = two_copies()
    first = ActiveAdamW(ours.items(), masks, **OPTIONS)
    start = {name: parameter.detach().clone() for name, parameter in ours.items()}
    rest = {name: ~mask for name, mask in masks.items()}
    run(ours, ActiveAdamW(ours.items(), rest, **OPTIONS), 1)
    assert all(torch.equal(ours[name] != start[name], rest[name]) for name in ours)
    first.release()  # removes nothing of the second's
    start = {name: parameter.detach().clone() for name, parameter in ours.items()}
    (ours["a"] * torch.ones_like(ours["a"])).sum().backward()
    assert not ours["a"].grad[masks["a"]].any()


def test_missing_misshapen_and_empty_masks_are_errors():
    _, masks, ours, _ = two_copies()
    with pytest.raises(InputError, match="no mask for parameter 'a'"):
        ActiveAdamW(ours.items(), {})
    with pytest.raises(InputError, match=r"masks\['b'\]: expected bool of shape \(7,\)"):
        ActiveAdamW(ours.items(), masks | {"b": torch.ones(6, dtype=torch.bool)})
    with pytest.raises(InputError, match="no element is active"):
        ActiveAdamW(ours.items(), {n: torch.zeros_like(m) for n, m in masks.items()})
