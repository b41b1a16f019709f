"""The plan: what is traced without memory is what really happens, and a profile that cannot fit is refused."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import make_tiny_model

from lorapar_utils import build, costs, plans
from lorapar_utils.costs import Machine, Operation, Shaped, Work, traced
from lorapar_utils.errors import InputError
from lorapar_utils.plans import Passes
from lorapar_utils.settings import load_profile


def step(model):
    ids = torch.ones(4, 12, dtype=torch.long, device=model.device)
    mask = torch.zeros(4, 1, 12, 12, device=model.device)
    positions = torch.ones(4, 12, dtype=torch.long, device=model.device)

    def go():
        model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.sum().backward()
        model.zero_grad(set_to_none=True)

    return go


def test_a_pass_without_memory_is_traced_as_the_real_one():
    real, hollow = (traced(step(make_tiny_model().to(device))) for device in ("cpu", "meta"))
    # Attention is one operation on a CPU, whose arithmetic torch does not count, and several without a device.
    products = [
        sum(count * operation.flops for operation, count in work.operations.items() if "mm" in str(operation.function))
        for work in (real, hollow)
    ]
    assert 0 < products[0] <= products[1] < 1.25 * products[0]
    assert hollow.peak == pytest.approx(real.peak, rel=0.1)


def test_arithmetic_of_a_matrix_product_and_the_bytes_it_moves():
    a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
    work = traced(lambda: (a @ b).add_(1))
    assert work.flops == 2 * 3 * 5 * 7
    assert work.peak == 4 * 3 * 7
    [moved] = [operation.moved for operation in work.operations if operation.flops]
    assert moved == 4 * (3 * 5 + 5 * 7 + 3 * 7)


def test_an_operation_takes_its_arithmetic_or_its_bytes_whichever_is_longer():
    machine = Machine("one X", 1.0, 0.0, overhead=0.0, flops=10.0, bandwidth=4.0, flops32=1.0)
    assert machine.seconds(Operation(None, (), None, flops=20, moved=4)) == 2.0
    assert machine.seconds(Operation(None, (), None, flops=20, moved=40)) == 10.0
    exact = (Shaped((2, 2), (2, 1), torch.float32),)
    assert machine.seconds(Operation(None, exact, None, flops=20, moved=4)) == 20.0


def test_calls_run_ahead_of_a_gpu_and_come_on_top_on_a_cpu(monkeypatch):
    monkeypatch.setattr(costs, "timed_here", lambda operation: 2.0)
    work = Work(Counter({Operation(None, (), None, flops=20, moved=4): 3}), peak=0, pace=5.0)
    gpu = Machine("one X", 1.0, 0.0, overhead=0.25, flops=10.0, bandwidth=4.0)
    assert work.seconds(gpu) == 6.0
    assert work.seconds(replace(gpu, overhead=1.0)) == 15.0
    assert work.seconds(replace(gpu, flops=None)) == 6.75


def test_layers_that_were_not_traced_cost_what_traced_ones_do():
    settings = load_profile("smoke", model={"dtype": "float32"})
    passes = Passes(settings, bundles=True)
    whole = plans._Shallow(settings, True, passes.lengths, plans.configuration(settings), 30)
    assert passes.elements == whole.elements
    assert passes.weights == whole.weights
    for kind, arguments in (("train_sft", ()), ("complete", (2, 12, 2))):
        found, expected = passes.work(kind, *arguments), getattr(whole, kind)(*arguments)
        assert found.operations == expected.operations
        assert found.peak + passes.weights == pytest.approx(expected.peak + whole.weights, rel=0.02)


def test_a_gpu_has_one_kernel_for_attention_and_one_for_dropout():
    settings = load_profile("smoke", model={"dtype": "bfloat16"}, adapter={"dropout": 0.1})
    passes = Passes(settings, bundles=False)
    for kind in ("train_sft", "train_grpo", "score"):
        names = Counter(str(operation.function) for operation in passes.work(kind, *[4] * (kind == "score")).operations)
        assert any("efficient_attention" in name for name in names) and not any(
            "softmax.default" in n and "log" not in n for n in names
        )
        assert any("native_dropout" in name for name in names) == (kind == "train_sft")


def test_what_a_batch_adds_and_what_checkpointing_saves():
    settings = load_profile("smoke", model={"dtype": "float32"})
    small = Passes(settings, bundles=False)
    large = Passes(settings.changed(sft={"batch_size": 16}), bundles=False)
    lean = Passes(settings.changed(sft={"batch_size": 16, "gradient_checkpointing": True}), bundles=False)
    one, four, saved = (passes.work("train_sft") for passes in (small, large, lean))
    assert four.peak == pytest.approx(4 * one.peak, rel=0.05)
    assert saved.peak < four.peak / 2
    assert four.flops < saved.flops < 1.6 * four.flops


def test_a_process_takes_its_share_of_a_step():
    alone = Passes(load_profile("smoke", sft={"batch_size": 8}), bundles=False).work("train_sft")
    halved = Passes(load_profile("smoke", sft={"batch_size": 8}, processes=2), bundles=False).work("train_sft")
    assert halved.flops == pytest.approx(alone.flops / 2, rel=0.01)


def test_a_profile_that_cannot_fit_is_refused_with_the_arithmetic():
    laptop = Machine("a laptop", 8e9, 0.6e9, 0.0, 1.0, 1.0)
    large, small = load_profile("llama2-7b"), load_profile("smoke")
    with pytest.raises(InputError, match=r"llama2-7b: .* needs \d+\.\d GB \(libraries 0.6 \+ weights 13.5 .* has 8.0"):
        plans.check_fits(large, laptop, Passes(large, bundles=False))
    plans.check_fits(small, laptop, Passes(small, bundles=True))


def test_four_bits_and_shares_take_less_memory():
    whole = Passes(load_profile("llama2-7b"), bundles=False).weights
    four_bits = Passes(load_profile("llama2-7b", model={"quantization": "nf4"}), bundles=False).weights
    shared = Passes(load_profile("llama2-7b", processes=4, model={"sharded": True}), bundles=False).weights
    assert whole == pytest.approx(2 * 6.738e9, rel=0.001)
    assert 0.27 < four_bits / whole < 0.32
    assert 0.25 < shared / whole < 0.30


def test_unknown_machines_and_models_are_named(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect")

    monkeypatch.setattr(plans.AutoConfig, "from_pretrained", unreachable)
    settings = load_profile("smoke")
    with pytest.raises(InputError, match="MACHINE = 'abacus': choose one of here, H200, H100"):
        plans.machine_named("abacus", settings)
    lost = settings.changed(model={"source": "nobody/nothing-7b"})
    with pytest.raises(InputError, match=r"no configuration there .* no profiles/architectures/nothing-7b.json"):
        plans.configuration(lost)


def test_a_model_that_cannot_be_traced_stops_neither_the_plan_nor_the_build(project, tmp_path, capsys):
    """Gemma-2 with capped attention knows no sdpa, which the tracing wants."""
    from conftest import make_tiny_tokenizer
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 8, "num_attention_heads": 4, "head_dim": 4}
    config = Gemma2Config(vocab_size=11, num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=0, **sizes)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    make_tiny_tokenizer().save_pretrained(tmp_path / "gemma")
    chosen = load_profile("smoke", publishable=True, model={"source": str(tmp_path / "gemma"), "dtype": "float32"})
    with pytest.raises(plans.NotTraced, match="gemma cannot be traced"):
        plans.traced_passes(chosen, plans.memory_here())
    build._check_before(chosen, here=True)
    assert "whether its memory suffices is not known" in capsys.readouterr().out
