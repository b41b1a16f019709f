"""Completions: greedy ones equal `model.generate`'s, drawn ones follow the model's distribution."""

import torch
from conftest import generated, make_tiny_model

from lorapar_utils.fast.completions import _draw, complete, next_token_logits, uniform

PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 8], [12, 13]]


def test_samples_follow_the_model_and_each_prompt_has_its_own():
    model = make_tiny_model()
    draws = uniform(8000, 1, 0)
    found = complete(model, PROMPTS[:2], ends=[63], max_new_tokens=1, samples=4000, temperature=1.5, draws=draws)
    for prompt, group in zip(PROMPTS, (found[:4000], found[4000:]), strict=False):
        expected = (model(torch.tensor([prompt])).logits[0, -1] / 1.5).softmax(-1)
        share = torch.bincount(torch.tensor(group).squeeze(1), minlength=64) / 4000
        assert (share - expected).abs().max() < 0.04


def test_what_is_drawn_for_a_row_does_not_depend_on_the_rows_beside_it():
    model = make_tiny_model()
    draws = uniform(len(PROMPTS) * 3, 12, 4, 2)
    together = complete(model, PROMPTS, ends=[63], max_new_tokens=12, samples=3, temperature=2.0, draws=draws)
    alone = []
    for number, prompt in enumerate(PROMPTS):
        own = draws[3 * number :][:3]
        alone += complete(model, [prompt], ends=[63], max_new_tokens=12, samples=3, temperature=2.0, draws=own)
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == len(together)


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]]).repeat(2000, 1)
    assert set(_draw(logits, 1.0, uniform(2000, 1, 0)[:, 0]).tolist()) == {1, 3}


def test_a_beginning_that_prompts_share_changes_nothing():
    model = make_tiny_model()
    beginning = [21, 22, 23, 24]
    prompts = [beginning + prompt for prompt in PROMPTS] + [beginning]
    assert complete(model, prompts, ends=[63], max_new_tokens=12) == [
        generated(model, prompt, 63, 12) for prompt in prompts
    ]
    alone = torch.cat([next_token_logits(model, [prompt]) for prompt in prompts])
    torch.testing.assert_close(next_token_logits(model, prompts), alone)


def test_a_prompt_asked_twice_still_has_a_token_to_read():
    model = make_tiny_model()
    assert complete(model, [[5, 9], [5, 9]], ends=[63], max_new_tokens=6) == [generated(model, [5, 9], 63, 6)] * 2


def test_a_completion_ends_where_it_is_stopped_and_the_others_go_on():
    model = make_tiny_model()
    whole = [generated(model, prompt, 63, 12) for prompt in PROMPTS]
    found = complete(model, PROMPTS, ends=[63], max_new_tokens=12, stopped=lambda tokens: tokens == whole[1][:4])
    assert found == [whole[0], whole[1][:4], *whole[2:]]
