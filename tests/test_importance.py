import pytest
import torch
from conftest import make_tiny_model
from measure import Operators
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr

from lorapar_utils import data, importance, models
from lorapar_utils.data.encoding import encode_examples
from lorapar_utils.errors import InputError
from lorapar_utils.importance import SCORES, score_importance
from lorapar_utils.settings import load_profile


def brute_force(model, examples, score="second_order"):
    """One example at a time, plain autograd, the paper's formula (or its Fisher alone)."""
    parameters = importance.lora_parameters(model)
    gradient = {n: torch.zeros_like(p) for n, p in parameters.items()}
    fisher = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for example in examples:
        model.zero_grad()
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        model(input_ids=ids, labels=labels).loss.backward()
        for name, p in parameters.items():
            gradient[name] += p.grad / len(examples)
            fisher[name] += p.grad**2 / len(examples)
    if score == "fisher":
        return fisher
    return {n: (gradient[n] * p - 0.5 * fisher[n] * p**2).abs().detach() for n, p in parameters.items()}


def worst_gap(found, expected):
    """Largest error of each matrix, relative to its largest score."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).abs().max() / expected[n].max()) for n in expected)


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_equals_the_one_example_loop(tiny_model, tiny_examples, batch_size):
    found = score_importance(tiny_model, tiny_examples, batch_size=batch_size)
    assert worst_gap(found, brute_force(tiny_model, tiny_examples)) <= 1e-4


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_the_fisher_is_of_per_example_gradients(tiny_model, tiny_examples, batch_size):
    """Alone, where the first-order term cannot hide it; one of squared batch gradients is another number."""
    exact = brute_force(tiny_model, tiny_examples, "fisher")
    found = score_importance(tiny_model, tiny_examples, batch_size=batch_size, score="fisher")
    assert worst_gap(found, exact) <= 1e-4
    phi = {name: p.detach() for name, p in importance.lora_parameters(tiny_model).items()}
    first = score_importance(tiny_model, tiny_examples, batch_size=batch_size, score="first_order")
    of_the_batch = {name: (first[name] / phi[name]) ** 2 for name in phi}
    assert all((of_the_batch[n] - exact[n]).abs().max() > 0.1 * exact[n].max() for n in exact)


def test_the_sums_of_all_matrices_take_as_many_calls_as_those_of_one(tiny_model, tiny_examples, monkeypatch):
    together = score_importance(tiny_model, tiny_examples, batch_size=4)
    counts = []
    add_up = importance.ExampleSums.add_up

    def counted(sums):
        matrices = len(sums._waiting)
        with Operators() as calls:
            add_up(sums)
        counts.append((matrices, sum(calls.names.values())))

    monkeypatch.setattr(importance.ExampleSums, "add_up", counted)
    score_importance(tiny_model, tiny_examples, batch_size=4)
    assert {matrices for matrices, _ in counts} == {12} and len({calls for _, calls in counts}) == 1
    calls_of_all = counts[0][1]
    counts.clear()
    monkeypatch.setattr(importance.ExampleSums, "WAITING", 1)
    alone = score_importance(tiny_model, tiny_examples, batch_size=4)
    assert {matrices for matrices, _ in counts} == {0, 1} and max(calls for _, calls in counts) == calls_of_all
    assert all(torch.equal(values, alone[name]) for name, values in together.items())


def test_what_is_made_once_a_call_is_made_of_all_matrices_at_once(tiny_model, tiny_examples):
    with Operators() as calls:
        score_importance(tiny_model, tiny_examples, batch_size=4, score="magnitude")
    for_each = {"aten.view.default", "aten.detach.default", "aten._to_copy.default"}
    assert {name: count for name, count in calls.names.items() if count > 2}.keys() <= for_each


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa"},
        {"target_modules": ["gate_proj", "o_proj"]},
        {"r": 2, "lora_dropout": 0.5},
    ],
    ids=str,
)
def test_equals_the_loop_for_other_adapters(tiny_model, tiny_examples, options):
    base = tiny_model.unload()
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**config | options))
    if "init_lora_weights" not in options:
        for parameter in importance.lora_parameters(model).values():
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    expected = brute_force(model, tiny_examples)
    model.train()
    assert worst_gap(score_importance(model, tiny_examples, batch_size=4), expected) <= 1e-4


def test_only_the_active_adapter_is_scored(tiny_model, tiny_examples):
    alone = score_importance(tiny_model, tiny_examples, batch_size=4)
    tiny_model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM"))
    both = score_importance(tiny_model, tiny_examples, batch_size=4)
    assert worst_gap(both, alone) <= 1e-6


def test_works_with_gradient_checkpointing(tiny_model, tiny_examples):
    expected = score_importance(tiny_model, tiny_examples, batch_size=4)
    tiny_model.gradient_checkpointing_enable({"use_reentrant": False})
    tiny_model.train()
    assert worst_gap(score_importance(tiny_model, tiny_examples, batch_size=4), expected) <= 1e-5


def test_alternatives_are_what_they_say(tiny_model, tiny_examples):
    parameters = importance.lora_parameters(tiny_model)
    score = {s: score_importance(tiny_model, tiny_examples, batch_size=4, score=s) for s in SCORES}
    for name, p in parameters.items():
        phi = p.detach()
        torch.testing.assert_close(score["magnitude"][name], phi.abs())
        # |g phi - F phi^2 / 2| lies within F phi^2 / 2 of |g phi|.
        slack = 0.5 * score["fisher"][name] * phi**2 * (1 + 1e-4) + 1e-9
        assert ((score["second_order"][name] - score["first_order"][name]).abs() <= slack).all()
    with pytest.raises(InputError, match="score = 'third': use one of second_order, first_order"):
        score_importance(tiny_model, tiny_examples, batch_size=4, score="third")


@pytest.fixture(scope="module")
def smollm():
    """The packaged model with an adapter in fp32, and six real examples of both systems."""
    settings = load_profile("smoke", model={"dtype": "float32"})
    base, tokenizer = models.load_base(settings)
    rows = [row for row in data.load_pool(settings) if row["split"] == "validation"][::2][:4]
    return models.attach_adapter(base, settings), encode_examples(rows, tokenizer, settings), settings


@pytest.mark.slow
def test_equals_the_one_example_loop_on_smollm2(smollm):
    model, examples, _ = smollm
    expected = brute_force(model, examples)
    assert worst_gap(score_importance(model, examples, batch_size=3), expected) <= 1e-4


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_bf16"), reason="no bf16 arithmetic on this CPU")
def test_bf16_keeps_the_ranks(smollm):
    """Compute in bf16 is not exact; the order of elements is what the partition takes from it."""
    model, examples, settings = smollm
    exact = score_importance(model, examples, batch_size=3)
    base, _ = models.load_base(settings.changed(model={"dtype": "bfloat16"}))
    rough = score_importance(models.attach_adapter(base, settings), examples, batch_size=3)
    flat = [torch.cat([v.flatten() for v in s.values()])[::97] for s in (exact, rough)]
    assert spearmanr(*flat).statistic > 0.9


def test_adapters_in_the_arithmetic_of_a_bf16_base_as_on_a_gpu(tiny_examples, monkeypatch):
    model = make_tiny_model(torch.bfloat16)
    exact = score_importance(model, tiny_examples, batch_size=1, in_batches=False)
    monkeypatch.setattr(importance, "_is_low", lambda model: True)
    scores = score_importance(model, tiny_examples, batch_size=4)
    error = sum((scores[name] - values).square().sum() for name, values in exact.items()).sqrt()
    assert 0 < error < 0.05 * sum(values.square().sum() for values in exact.values()).sqrt()
    layers = [module for module in model.modules() if hasattr(module, "cast_input_dtype_enabled")]
    assert layers and all(layer.cast_input_dtype_enabled for layer in layers)


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
    next(iter(importance.lora_parameters(tiny_model).values())).data[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        score_importance(tiny_model, tiny_examples, batch_size=4)


def test_no_example_and_no_answer_are_errors(tiny_model):
    with pytest.raises(InputError, match="none to score"):
        score_importance(tiny_model, [], batch_size=4)
    with pytest.raises(InputError, match=r"examples\[0\]: no answer token"):
        score_importance(tiny_model, [{"input_ids": [1, 2], "labels": [-100, -100]}], batch_size=4)


def test_examples_longer_than_the_context_are_named(tiny_model):
    long = {"input_ids": [3] * 3000, "labels": [3] * 3000}
    with pytest.raises(InputError, match=r"examples\[0\]: 3000 tokens exceed the model's context of 2048"):
        score_importance(tiny_model, [long], batch_size=4)
