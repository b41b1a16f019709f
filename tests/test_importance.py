import pytest
import torch

from lorapar_utils.errors import InputError
from lorapar_utils.importance import score_importance
from lorapar_utils.models import lora_parameters


def brute_force(model, examples):
    """One example at a time, plain autograd, the paper's formula."""
    parameters = lora_parameters(model)
    gradient = {n: torch.zeros_like(p) for n, p in parameters.items()}
    fisher = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for example in examples:
        model.zero_grad()
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        model(input_ids=ids, labels=labels).loss.backward()
        for name, p in parameters.items():
            gradient[name] += p.grad / len(examples)
            fisher[name] += p.grad**2 / len(examples)
    return {n: (gradient[n] * p - 0.5 * fisher[n] * p**2).abs().detach() for n, p in parameters.items()}


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_equals_the_one_example_loop(tiny_model, tiny_examples, batch_size):
    expected = brute_force(tiny_model, tiny_examples)
    found = score_importance(tiny_model, tiny_examples, batch_size=batch_size)
    assert found.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max()
        assert (found[name] - expected[name]).abs().max() <= 1e-4 * scale


def test_a_fisher_of_squared_batch_gradients_would_be_noticed(tiny_model, tiny_examples):
    """The guard on the test above: the wrong Fisher lies outside its tolerance."""
    exact = brute_force(tiny_model, tiny_examples)
    gradient = {name: torch.zeros_like(p) for name, p in lora_parameters(tiny_model).items()}
    for example in tiny_examples:
        tiny_model.zero_grad()
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        tiny_model(input_ids=ids, labels=labels).loss.backward()
        for name, p in lora_parameters(tiny_model).items():
            gradient[name] += p.grad / len(tiny_examples)
    gaps = []
    for name, p in lora_parameters(tiny_model).items():
        wrong = (gradient[name] * p - 0.5 * gradient[name] ** 2 * p**2).abs()
        gaps.append(float((wrong - exact[name]).abs().max() / exact[name].max()))
    assert max(gaps) > 10 * 1e-4, gaps


def test_independent_of_order(tiny_model, tiny_examples):
    forward = score_importance(tiny_model, tiny_examples, batch_size=3)
    backward = score_importance(tiny_model, tiny_examples[::-1], batch_size=4)
    for name in forward:
        torch.testing.assert_close(forward[name], backward[name], rtol=1e-4, atol=1e-8)


def test_leaves_the_model_as_it_was(tiny_model, tiny_examples):
    tiny_model.train()
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in tiny_model.named_parameters()}
    score_importance(tiny_model, tiny_examples, batch_size=4)
    assert tiny_model.training
    for name, p in tiny_model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1] and p.grad is None


def test_zero_b_is_an_error_that_names_the_remedy(tiny_model, tiny_examples):
    for name, p in tiny_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(p)
    with pytest.raises(InputError, match=r"B = 0.*adapter\.init"):
        score_importance(tiny_model, tiny_examples, batch_size=4)


def test_nan_weights_are_an_error(tiny_model, tiny_examples):
    next(iter(lora_parameters(tiny_model).values())).data[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        score_importance(tiny_model, tiny_examples, batch_size=4)


def test_no_example_and_no_answer_are_errors(tiny_model):
    with pytest.raises(InputError, match="none to score"):
        score_importance(tiny_model, [], batch_size=4)
    with pytest.raises(InputError, match=r"examples\[0\]: no answer token"):
        score_importance(tiny_model, [{"input_ids": [1, 2], "labels": [-100, -100]}], batch_size=4)
