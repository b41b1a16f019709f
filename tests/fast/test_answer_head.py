"""The answer head against TRL's own: same loss, log-probabilities and gradients, fewer rows."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from lorapar_utils.fast.answer_head import drop_trl_head, use_answer_head

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
