"""Completions in batches: a prefix that all prompts share is read once, and a finished row leaves the batch.

Deviation from `model.generate`, which reads the prompt once per sample and keeps finished rows until the longest row
ends. Greedy completions are equal token by token (tested); sampled ones have the same distribution. For a model whose
state cannot be shared (see `checks`) we call `model.generate`. Sampling depends on the random numbers given for each
row, not on the batch or process that a row is in.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from lorapar_utils.fast.architecture import rotation_limit
from lorapar_utils.fast.checks import shortcuts_of
from lorapar_utils.fast.decoding import (
    Choose,
    answering,
    decode,
    has_virtual_tokens,
    left_padded,
    read,
    read_prefix,
    whole_base,
)


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Sequence[int],
    max_new_tokens: int,
    samples: int = 1,
    temperature: float | None = None,
    draws: torch.Tensor | None = None,
    stopped: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Greedy or sampled completions of each prompt.

    Parameters
    ----------
    prompts
        Token ids of each prompt.
    ends
        Tokens that end a completion.
    samples
        Completions per prompt.
    temperature
        Sampling temperature; None for greedy.
    draws
        Random numbers in [0, 1) that decide the sampled tokens: float32, shape (prompts x samples, max_new_tokens).
        See `uniform`.
    stopped
        Called with a completion's tokens after each new token; True ends the completion, as a token of `ends` does.

    Returns
    -------
    list of list of int
        `samples` completions of the first prompt, then of the second, … The end token is included. A completion
        without an end token was cut at `max_new_tokens`.
    """
    limits = {"ends": ends, "max_new_tokens": max_new_tokens, "samples": samples, "stopped": stopped}

    def choose(logits: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        return logits.argmax(-1) if temperature is None else _draw(logits, temperature, draws[rows.cpu(), step])

    longest = max(map(len, prompts)) + max_new_tokens
    if has_virtual_tokens(model) or not shortcuts_of(model).completions or longest > rotation_limit(model):
        return _generate(model, prompts, choose, **limits)
    return decode(model, prompts, choose, **limits)


def uniform(rows: int, tokens: int, *seed: int) -> torch.Tensor:
    """Random numbers in [0, 1) for `complete`: float32, shape (rows, tokens), fixed by the integers of `seed`."""
    return torch.from_numpy(np.random.default_rng(seed).random((rows, tokens), dtype=np.float32))


@torch.no_grad()
def next_token_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits of the token after each prompt, shape (prompts, vocabulary), in the dtype of the base."""
    with answering(model):
        if shortcuts_of(model).completions and max(map(len, prompts)) <= rotation_limit(model):
            return read(model, prompts, read_prefix(model, prompts))[0]
        logits = [model(input_ids=torch.tensor([prompt], device=model.device)).logits[0, -1] for prompt in prompts]
        return torch.stack(logits)


def _generate(model, prompts, choose: Choose, *, ends, max_new_tokens, samples, stopped) -> list[list[int]]:
    """`complete` by `model.generate`, which supports virtual tokens and every kind of state.

    Padding may leak into a recurrent or convolution state, so every batch holds prompts of one length.
    """
    groups: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(0 if has_virtual_tokens(model) else len(prompt), []).append(number)
    completions: dict[int, list[list[int]]] = {}
    with answering(model), whole_base(model):
        for numbers in groups.values():
            ids, mask = left_padded([prompts[i] for i in numbers for _ in range(samples)], ends[0], model.device)
            rows = torch.tensor([i * samples + k for i in numbers for k in range(samples)])
            sequences = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(ends),
                pad_token_id=ends[0],
                logits_processor=LogitsProcessorList([_Choice(choose, rows)]),
                stopping_criteria=StoppingCriteriaList([_Stopped(stopped, ids.shape[1])] if stopped else []),
            )
            tokens = [_until_end(row, ends, stopped) for row in sequences[:, ids.shape[1] :].tolist()]
            completions |= {i: tokens[row * samples :][:samples] for row, i in enumerate(numbers)}
    return [tokens for number in range(len(prompts)) for tokens in completions[number]]


class _Choice(LogitsProcessor):
    """Gives every token except the choice of `choose` a logit of -inf, so that `generate` must take this choice."""

    def __init__(self, choose: Choose, rows: torch.Tensor):
        self.choose, self.rows, self.step = choose, rows, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = self.choose(scores, self.rows, self.step)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _Stopped(StoppingCriteria):
    """Calls `stopped` with the completion tokens of each row."""

    def __init__(self, stopped: Callable[[list[int]], bool], prompt: int):
        self.stopped, self.prompt = stopped, prompt

    def __call__(self, input_ids: torch.Tensor, scores, **_) -> torch.Tensor:
        rows = input_ids[:, self.prompt :].tolist()
        return torch.tensor([self.stopped(tokens) for tokens in rows], device=input_ids.device)


def _until_end(tokens: list[int], ends: Sequence[int], stopped: Callable[[list[int]], bool] | None) -> list[int]:
    for count, token in enumerate(tokens, start=1):
        if token in ends or (stopped is not None and stopped(tokens[:count])):
            return tokens[:count]
    return tokens


def _draw(logits: torch.Tensor, temperature: float, uniform: torch.Tensor) -> torch.Tensor:
    """Sample one token per row by inverting the cumulative distribution, which needs one random number per row."""
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
    thresholds = uniform.to(logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
