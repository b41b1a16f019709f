"""Every method of the comparison: it trains, generates, and its saved adapter goes onto the original base."""

import pytest
import torch
from conftest import make_tiny_base, make_tiny_tokenizer
from peft import PeftModel
from tiny_training import examples

from lorapar_utils import evaluation, models, training
from lorapar_utils.settings import METHODS, load_profile

PROMPT = torch.tensor([[8, 4, 7, 5, 9], [8, 6, 7, 6, 9]])


def settings(method):
    return load_profile(
        "smoke",
        model={"dtype": "float32", "system_prompt": "system"},
        adapter={"r": 4, "virtual_tokens": 3} | METHODS[method],
        sft={"epochs": 1, "batch_size": 6, "learning_rate": 0.02},
        evaluation={"max_new_tokens": 4},
    )


def logits(model):
    with torch.no_grad():
        # The last ones: some methods answer for their virtual tokens too.
        return model.eval()(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT)).logits[:, -PROMPT.shape[1] :]


@pytest.mark.parametrize("method", METHODS)
def test_trains_and_reloads_onto_the_original_base(method, tmp_path):
    chosen, tokenizer = settings(method), make_tiny_tokenizer()
    untrained = logits(make_tiny_base())
    model = models.attach_adapter(make_tiny_base(), chosen)
    initial = None
    if method in ("olora", "pissa"):
        initial = tmp_path / "initial"
        model.save_pretrained(initial)
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.requires_grad}
    training.run_sft(model, tokenizer, examples(), masks, chosen)
    trained = logits(model)
    assert (trained - untrained).abs().max() > 1e-3

    models.save_adapter(model, tmp_path, initial)
    torch.testing.assert_close(logits(model), trained)
    reloaded = PeftModel.from_pretrained(make_tiny_base(), tmp_path / "adapter")
    torch.testing.assert_close(logits(reloaded), trained, rtol=1e-4, atol=1e-5)

    again = models.attach_adapter(make_tiny_base(), chosen)
    models.restore_adapter(again, tmp_path)
    for (name, ours), (_, theirs) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("method", METHODS)
def test_completions_are_those_of_generate(method):
    chosen, tokenizer = settings(method), make_tiny_tokenizer()
    model = models.attach_adapter(make_tiny_base(), chosen).eval()
    prompts = [example["prompt"] for example in examples()[:3]]
    found = [text for [(text, _)] in evaluation.generate(model, tokenizer, prompts, chosen)]
    expected = []
    for prompt in prompts:
        ids = tokenizer(f"system system user {prompt} assistant ", return_tensors="pt").input_ids
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4)
        expected.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    assert found == expected


def test_a_checkpointed_pissa_stage_resumes_over_the_same_residual(tmp_path):
    chosen = settings("pissa").changed(checkpoint_every=2)
    ends = []
    for cut in (False, True):
        model = models.attach_adapter(make_tiny_base(), chosen)
        masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.requires_grad}
        training.run_sft(model, make_tiny_tokenizer(), examples(), masks, chosen, tmp_path)
        ends.append(logits(model))
        if not cut:
            (tmp_path / "checkpoint-4" / "finished").unlink()
    assert torch.equal(*ends)


@pytest.mark.parametrize("method", METHODS)
def test_trains_and_answers_over_a_bfloat16_base(method):
    """As on a CPU that multiplies bfloat16: some adapters know PEFT's input casts, others do not."""
    chosen, tokenizer = settings(method).changed(model={"dtype": "bfloat16"}), make_tiny_tokenizer()
    model = models.attach_adapter(make_tiny_base().to(torch.bfloat16), chosen)
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n in masks}
    training.run_sft(model, tokenizer, examples(), masks, chosen)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert len(evaluation.generate(model, tokenizer, ["1 + 2"], chosen)) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_kl_term_leaves_the_base_and_the_adapters_configuration_as_they_were(method):
    grpo = {"kl": 0.5, "steps": 2, "prompts_per_step": 2, "completions": 4, "micro_batch": 8}
    chosen = settings(method).changed(grpo=grpo)
    model = models.attach_adapter(make_tiny_base(), chosen)
    config = model.peft_config["default"].to_dict()
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.requires_grad}
    base = {n: p.detach().clone() for n, p in model.named_parameters() if n not in masks}
    history = training.run_grpo(model, make_tiny_tokenizer(), examples(), masks, chosen)
    assert history[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert list(model.peft_config) == ["default"] and model.peft_config["default"].to_dict() == config
