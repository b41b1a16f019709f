"""Each shortcut beside the upstream function that it stands for: equal, so that either can be taken (`speed`)."""

import importlib

import datasets
import pytest
import torch
from conftest import generated, make_tiny_base, make_tiny_model, make_tiny_policy, make_tiny_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_training import train
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from lorapar_utils import importance, models
from lorapar_utils.fast.answer_head import drop_trl_head, use_answer_head
from lorapar_utils.fast.checks import shortcuts_of
from lorapar_utils.fast.completions import complete
from lorapar_utils.fast.grpo_trainer import LeanGRPOTrainer
from lorapar_utils.fast.lm_eval_model import LeanLM
from lorapar_utils.fast.shared_prefix import hidden_before
from lorapar_utils.settings import METHODS, SHORTCUTS, load_profile

# Shortcut -> what it stands for. A test below holds each pair equal.
UPSTREAM = {
    "importance": "torch.autograd.grad",  # one example at a time
    "answer_head": "trl.trainer.utils.add_fused_lm_head",
    "shared_prefix": "transformers.LlamaModel.forward",  # one padded row a sequence; and any other architecture's
    "completions": "transformers.GenerationMixin.generate",
    "grpo_trainer": "trl.GRPOTrainer",
    "lm_eval_model": "lm_eval.models.huggingface.HFLM",
}


def test_every_shortcut_names_a_function_that_exists_upstream():
    assert tuple(UPSTREAM) == SHORTCUTS
    for path in UPSTREAM.values():
        parts = path.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:cut]))
                break
            except ImportError:
                continue
        for part in parts[cut:]:
            found = getattr(found, part)
        assert callable(found)


@pytest.mark.parametrize("speed", ["fast", "plain", ["completions"]])
def test_the_profile_says_which_shortcuts_are_taken(project, saved_model, speed, capsys):
    settings = load_profile("smoke", speed=speed, model={"source": str(saved_model), "dtype": "float32"})
    model, _ = models.load_base(settings)
    shortcuts = shortcuts_of(model)
    taken = [name for name in ("answer_head", "shared_prefix", "completions") if getattr(shortcuts, name)]
    assert taken == [name for name in settings.shortcuts if hasattr(shortcuts, name)]
    assert settings.shortcuts == {"fast": SHORTCUTS, "plain": ()}.get(str(speed), ("completions",))
    assert "by the libraries' own path" not in capsys.readouterr().out


# --- importance: torch.autograd.grad, one example at a time -----------------------------------------------------


def test_importance_in_batches_equals_one_example_at_a_time(tiny_model, tiny_examples):
    fast, plain = (
        importance.score_importance(tiny_model, tiny_examples, batch_size=4, in_batches=in_batches)
        for in_batches in (True, False)
    )
    for name in plain:
        torch.testing.assert_close(fast[name], plain[name], rtol=1e-4, atol=1e-6)


def test_without_the_shortcut_no_batch_is_read(tiny_model, tiny_examples, monkeypatch):
    monkeypatch.setattr(importance, "_summed_loss", lambda *_: pytest.fail("a batch was read"))
    importance.score_importance(tiny_model, tiny_examples, batch_size=4, in_batches=False)


# --- answer_head: trl.trainer.utils.add_fused_lm_head -------------------------------------------------------------

FIELDS = ("log_probs", "entropy", "is_top1")


def model_and_batch():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    ids = torch.randint(3, 97, (3, 11))
    labels = ids.clone()
    labels[0, :6], labels[1, :9], labels[2, :2] = -100, -100, -100
    labels[2, 5] = -100
    return LlamaForCausalLM(config).eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def outcome(model, batch, **options):
    model.zero_grad()
    found = model(**batch, fused_lm_head=True, **options)
    found.loss.backward()
    return found, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("temperature", [1.0, 1.2])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": torch.tensor(40)}], ids=["alone", "accumulated"])
def test_equals_trl(temperature, options):
    model, batch = model_and_batch()
    add_fused_lm_head(model, temperature=temperature, outputs=FIELDS)
    expected, gradients = outcome(model, batch, **options)
    use_answer_head(model, temperature)
    found, ours = outcome(model, batch, **options)
    torch.testing.assert_close(found.loss, expected.loss)
    assert torch.equal(found.label_mask, expected.label_mask)
    for field in FIELDS:
        torch.testing.assert_close(getattr(found, field), getattr(expected, field))
    for name in gradients:
        torch.testing.assert_close(ours[name], gradients[name])


def test_other_calls_and_dropping_leave_the_model_as_it_was():
    model, batch = model_and_batch()
    expected = model(**batch)
    add_fused_lm_head(model, temperature=1.0, outputs=FIELDS)
    use_answer_head(model)
    torch.testing.assert_close(model(**batch).logits, expected.logits)
    drop_trl_head(model)
    assert "forward" not in model.__dict__
    torch.testing.assert_close(model(**batch).loss, expected.loss)


# --- shared_prefix: the model's own forward over padded rows -------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_and_gradients_equal_those_of_padded_rows(side, attention):
    model = make_tiny_model()
    model.get_base_model().set_attn_implementation(attention)
    backbone = model.get_base_model().base_model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    generator = torch.Generator().manual_seed(3)
    shared = torch.randint(3, 64, (6,), generator=generator).tolist()
    rows = [shared[: 6 - i // 3] + torch.randint(3, 64, (2 + i,), generator=generator).tolist() for i in range(5)]
    width = max(map(len, rows))
    padded = [([0] * (width - len(r)) + r) if side == "left" else (r + [0] * (width - len(r))) for r in rows]
    kept = [
        [0] * (width - len(r)) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * (width - len(r)) for r in rows
    ]
    ids, mask = torch.tensor(padded), torch.tensor(kept)
    scored = (mask[:, 1:] * mask[:, :-1]).bool()
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def gradients(states):
        model.zero_grad()
        states.sin().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = backbone(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state[:, :-1][scored]
    ours = hidden_before(backbone, ids, mask, scored)
    torch.testing.assert_close(ours, plain)
    expected, found = gradients(plain), gradients(ours)
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


# --- completions: transformers' generate ---------------------------------------------------------------------------

PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 8], [12, 13]]


def test_greedy_completions_equal_those_of_generate_whatever_ends_first():
    model = make_tiny_model()
    # An end token that some prompts meet early and others never.
    seen = [generated(model, prompt, 63, 12) for prompt in PROMPTS]
    end = seen[0][3]
    expected = [generated(model, prompt, end, 12) for prompt in PROMPTS]
    assert len({len(tokens) for tokens in expected}) > 1
    assert complete(model, PROMPTS, ends=[end], max_new_tokens=12) == expected
    assert complete(model, PROMPTS[:1], ends=[end], max_new_tokens=12, samples=3) == [expected[0]] * 3


# --- grpo_trainer: trl.GRPOTrainer -----------------------------------------------------------------------------------


def grpo_trainer(kind, folder, kl=0.0):
    model = make_tiny_policy()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    config = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        beta=kl,
        report_to="none",
        per_device_train_batch_size=8,
        num_generations=4,
        temperature=1.2,
        max_completion_length=6,
        gradient_accumulation_steps=1,
    )
    rows = datasets.Dataset.from_list([{"prompt": "1 + 2 assistant"}] * 8)
    trainer = kind(model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
                   train_dataset=rows, processing_class=make_tiny_tokenizer())  # fmt: skip
    return trainer, model


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("idle", [(0, 2, 3), (), range(8)], ids=["some", "none", "all"])
@pytest.mark.parametrize("kl", [0.0, 0.04])
def test_grpo_loss_gradients_and_metrics_equal_those_of_trl(tmp_path, loss_type, idle, kl):
    generator = torch.Generator().manual_seed(2)
    advantages = torch.randn(8, generator=generator)
    advantages[list(idle)] = 0.0
    completion = torch.randint(1, 11, (8, 6), generator=generator)
    lengths = torch.randint(1, 7, (8, 1), generator=generator)
    inputs = {
        "prompt_ids": torch.tensor([[0, 8, 4, 7, 5], [8, 6, 7, 6, 9]]).repeat_interleave(4, 0),
        "prompt_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).repeat_interleave(4, 0),
        "completion_ids": completion,
        "completion_mask": (torch.arange(6) < lengths).int(),
        "advantages": advantages,
        "num_items_in_batch": lengths.sum(),
        "ref_per_token_logps": -3 * torch.rand(8, 6, generator=generator),
    }
    outcomes = []
    for kind in (GRPOTrainer, LeanGRPOTrainer):
        trainer, model = grpo_trainer(kind, tmp_path, kl)
        trainer.loss_type = loss_type
        trainer.current_gradient_accumulation_steps = 1
        if kind is not GRPOTrainer:
            use_answer_head(model.get_base_model(), 1.2)
        model.train()
        loss = trainer._compute_loss(model, dict(inputs))
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        outcomes.append((loss.detach(), gradients, dict(trainer._metrics["train"])))
    (loss, gradients, metrics), (ours, found, measured) = outcomes
    torch.testing.assert_close(ours, loss)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    assert measured.keys() == metrics.keys()
    for name, values in metrics.items():
        assert measured[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


def test_the_stock_trainer_is_taken_where_the_shortcut_is_off(monkeypatch):
    """TRL draws with torch's generator and generates by itself, so completions differ; what is logged does not."""
    monkeypatch.setattr(LeanGRPOTrainer, "_compute_loss", lambda *_, **__: pytest.fail("the shortcut was taken"))
    *_, history = train("grpo", speed="plain")
    assert len([entry for entry in history if "reward" in entry]) == 6
    assert all("entropy" in entry and "completions/mean_length" in entry for entry in history if "reward" in entry)


# --- lm_eval_model: lm-eval's HFLM -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning"])
def test_adapters_answer_as_with_the_stock_model_of_lm_eval(method):
    """Virtual tokens are left to `HFLM`; everything else is read with a shared beginning."""
    tokenizer = make_tiny_tokenizer()
    settings = load_profile("smoke", adapter={"r": 4, "virtual_tokens": 3} | METHODS[method])
    torch.manual_seed(0)
    model = models.attach_adapter(make_tiny_base(), settings).eval()
    ours, theirs = (kind(pretrained=model, tokenizer=tokenizer, batch_size=4) for kind in (LeanLM, HFLM))
    prompts = [
        "user 1 + 2 assistant",
        "user 1 + 3 + 3 assistant",
        "user 1 + 1 system",
        "user 1",
        "user 1 + 2 assistant 3",
    ]

    def asked(kind, arguments):
        return [Instance(kind, {}, given, i, metadata=("tiny", i, 1)) for i, given in enumerate(arguments)]

    wanted = [(prompt, {"until": ["2", "system"], "max_gen_toks": 8}) for prompt in prompts]
    completions = [lm.generate_until(asked("generate_until", wanted)) for lm in (ours, theirs)]
    assert completions[0] == completions[1] and len(set(completions[0])) > 1
    pairs = [(prompt, f" {digit}") for prompt in prompts for digit in (1, 2, 3)]
    found = [lm.loglikelihood(asked("loglikelihood", pairs)) for lm in (ours, theirs)]
    assert [likeliest for _, likeliest in found[0]] == [likeliest for _, likeliest in found[1]]
    values = [[value for value, _ in answers] for answers in found]
    assert values[0] == pytest.approx(values[1], abs=1e-4) and len({round(value, 4) for value in values[0]}) > 3
    # The stock model does not note what was cut off.
    sent = asked("generate_until", wanted)
    ours.generate_until(sent)
    assert {hasattr(request, "truncated") for request in sent} == {method == "lora"}
