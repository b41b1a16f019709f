"""Completions in batches: a prefix that all prompts share is read once, and a finished row leaves the batch.

Deviation from `model.generate`, which reads the prompt once per sample and keeps finished rows until the longest row
ends. Greedy completions are equal token by token (tested); sampled ones have the same distribution. For a model whose
state cannot be shared (see `shortcuts`) we call `model.generate`. Sampling depends on the random numbers given for each
row, not on the batch or process that a row is in.
"""

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.fsdp import FSDPModule
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lorapar_utils.shortcuts import attention_window, rotation_limit, shortcuts_of

# Maps (logits, row indices, step) to the next tokens.
Choose = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


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


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    choose: Choose,
    *,
    ends: Sequence[int],
    max_new_tokens: int,
    samples: int = 1,
    stopped: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """The decoding loop of `complete`: a shared prefix is read once, and a finished row leaves the batch.

    Parameters
    ----------
    choose
        Maps logits, shape (rows, vocabulary), row indices, shape (rows,), and the step to next tokens, shape (rows,).
    """
    ends = torch.tensor(ends, device=model.device)
    completions: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
    rows = torch.arange(len(completions), device=model.device)
    # As in training, adapters are stored in fp32 and multiplied in the dtype of the base.
    with answering(model), whole_base(model):
        logits, mask, cache = _read(model, prompts, max_new_tokens)
        if samples > 1:
            cache.batch_repeat_interleave(samples)
            logits, mask = logits.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
        for step in range(max_new_tokens):
            tokens = choose(logits, rows, step)
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                completions[row].append(token)
            running = ~torch.isin(tokens, ends)
            if stopped is not None:
                running &= torch.tensor([not stopped(completions[row]) for row in rows.tolist()], device=model.device)
            if step + 1 == max_new_tokens or not running.any():
                break
            if not running.all():
                cache.batch_select_indices(running.nonzero().squeeze(1))
                rows, mask, tokens = rows[running], mask[running], tokens[running]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = _next(model, tokens[:, None], mask, cache)
    return completions


def uniform(rows: int, tokens: int, *seed: int) -> torch.Tensor:
    """Random numbers in [0, 1) for `complete`: float32, shape (rows, tokens), fixed by the integers of `seed`."""
    return torch.from_numpy(np.random.default_rng(seed).random((rows, tokens), dtype=np.float32))


@torch.no_grad()
def next_token_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits of the token after each prompt, shape (prompts, vocabulary), in the dtype of the base."""
    with answering(model):
        if shortcuts_of(model).completions and max(map(len, prompts)) <= rotation_limit(model):
            return _read(model, prompts)[0]
        logits = [model(input_ids=torch.tensor([prompt], device=model.device)).logits[0, -1] for prompt in prompts]
        return torch.stack(logits)


def has_virtual_tokens(model: PreTrainedModel) -> bool:
    """Whether the adapter puts trained virtual tokens before each prompt. Only PEFT's own methods can do so."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


@contextlib.contextmanager
def whole_base(model: PreTrainedModel):
    """A context in which every process holds the whole base, even if FSDP has sharded the base.

    FSDP needs all processes to run the same number of steps. In generation each process runs as many as its rows need.
    """
    layers = [module for module in model.modules() if isinstance(module, FSDPModule)]
    sharded = [layer for layer in layers if not getattr(layer, "_kept_whole", False)]
    for layer in sharded:
        layer._kept_whole = True
        layer.set_reshard_after_forward(False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in sharded:
            layer._kept_whole = False
            layer.set_reshard_after_forward(True)
            layer.reshard()


def answering(model: PreTrainedModel):
    """A context for inference.

    Adapters stored in fp32 are multiplied in the base's dtype, and PEFT does not cast inputs to fp32. A mixture of
    experts computes no router loss, because the router loss does not work with a cache.
    """
    low = model.dtype in (torch.bfloat16, torch.float16)
    stack = contextlib.ExitStack()
    stack.enter_context(torch.autocast(model.device.type, dtype=model.dtype, enabled=low))
    stack.enter_context(without_input_casts(model, active=low))
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False
        stack.callback(setattr, config, "output_router_logits", True)
    return stack


def without_input_casts(model: PreTrainedModel, active: bool):
    """A context in which PEFT does not cast adapter inputs to fp32 and back. IA3 and SHiRA have no such casts."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    has_casts = all(hasattr(layer, "cast_input_dtype_enabled") for layer in layers)
    return disable_input_dtype_casting(model, active=active and has_casts)


def _read(model: PreTrainedModel, prompts, room: int = 0) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
    """Logits after each prompt (prompts, vocabulary), attention mask and cache. A shared prefix is read once.

    The caller will generate `room` more tokens.
    """
    cache = DynamicCache(config=model.config)
    # Leave at least one token out of the shared prefix, so that each prompt gives logits.
    shortest = min(map(len, prompts)) - 1
    shared = next((i for i in range(shortest) if len({prompt[i] for prompt in prompts}) > 1), shortest)
    # Padding comes after the shared prefix and would push this prefix out of an attention window.
    windowed = max(map(len, prompts)) + room > attention_window(model)
    shared = 0 if windowed or len(prompts) == 1 else shared
    ids, mask = _left_padded([prompt[shared:] for prompt in prompts], 0, model.device)
    if shared:
        prefix = torch.tensor([prompts[0][:shared]], device=model.device)
        _next(model, prefix, torch.ones_like(prefix), cache)
        cache.batch_repeat_interleave(len(prompts))
        mask = torch.cat([mask.new_ones(len(prompts), shared), mask], 1)
    return _next(model, ids, mask, cache), mask, cache


def _left_padded(prompts, filler: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = [[filler] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


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
            ids, mask = _left_padded([prompts[i] for i in numbers for _ in range(samples)], ends[0], model.device)
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


def _next(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Logits of the token after `ids`, shape (batch, vocabulary). Adds `ids` to the cache."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, **options).logits[:, -1]


def _draw(logits: torch.Tensor, temperature: float, uniform: torch.Tensor) -> torch.Tensor:
    """Sample one token per row by inverting the cumulative distribution, which needs one random number per row."""
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
    thresholds = uniform.to(logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
