"""Completions in batches: what prompts share is read once, and a finished row leaves the batch.

Deviation: not `model.generate`, which reads every sample of a prompt, and a beginning that all prompts share, once for
each row, and decodes a finished row to the end of the longest. Equal to it token by token where nothing is drawn
(tested); draws are the same distribution. Where a model's state cannot be shared so (see `shortcuts`), it is
`model.generate`. What is drawn depends on numbers given for each row, not on how rows are batched, nor on which process
has them.
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

# Next tokens from (logits, rows' numbers, step).
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
    """Completions of each prompt, greedy or drawn.

    Parameters
    ----------
    prompts
        Token ids of each prompt.
    ends
        Tokens that end a completion.
    samples
        Completions of each prompt.
    temperature
        Logits are divided by it and a token is drawn; None takes the likeliest token.
    draws
        What decides each drawn token: numbers in [0, 1), shape (prompts x samples, max_new_tokens); see `uniform`.
    stopped
        Whether a completion so far has ended, beside `ends`; asked after each of its tokens.

    Returns
    -------
    list of list of int
        `samples` completions of the first prompt, then of the second, …; the end token included, so one without it
        was cut at `max_new_tokens`.
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
    """`complete`'s own loop: prompts share what they begin with, and a row that has ended leaves the batch.

    Parameters
    ----------
    choose
        Next tokens, shape (rows,), from their logits, shape (rows, vocabulary), the rows' numbers and the step.
    """
    ends = torch.tensor(ends, device=model.device)
    completions: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
    rows = torch.arange(len(completions), device=model.device)
    # As in training: adapters are kept in fp32 and multiplied in the dtype of the base.
    with answering(model), whole_base(model):
        logits, mask, cache = _read(model, prompts, max_new_tokens)
        if samples > 1:
            cache.batch_repeat_interleave(samples)
            logits, mask = logits.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
        for step in range(max_new_tokens):
            tokens = choose(logits, rows, step)
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                completions[row].append(token)
            going = ~torch.isin(tokens, ends)
            if stopped is not None:
                going &= torch.tensor([not stopped(completions[row]) for row in rows.tolist()], device=model.device)
            if step + 1 == max_new_tokens or not going.any():
                break
            if not going.all():
                cache.batch_select_indices(going.nonzero().squeeze(1))
                rows, mask, tokens = rows[going], mask[going], tokens[going]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = _next(model, tokens[:, None], mask, cache)
    return completions


def uniform(rows: int, tokens: int, *seed: int) -> torch.Tensor:
    """Numbers in [0, 1) for `complete`, shape (rows, tokens), fixed by the integers of `seed`."""
    return torch.from_numpy(np.random.default_rng(seed).random((rows, tokens), dtype=np.float32))


@torch.no_grad()
def next_token_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits of the token after each prompt, shape (prompts, vocabulary), in the dtype of the base."""
    with answering(model):
        if shortcuts_of(model).completions and max(map(len, prompts)) <= rotation_limit(model):
            return _read(model, prompts)[0]
        alone = [model(input_ids=torch.tensor([prompt], device=model.device)).logits[0, -1] for prompt in prompts]
        return torch.stack(alone)


def has_virtual_tokens(model: PreTrainedModel) -> bool:
    """Whether an adapter puts trained tokens before each prompt, which only PEFT's own methods know how to do."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


@contextlib.contextmanager
def whole_base(model: PreTrainedModel):
    """A context in which a base that is shared out over processes (FSDP) is whole in each.

    Processes complete different prompts in different numbers of steps: they cannot collect it layer by layer together.
    """
    layers = [module for module in model.modules() if isinstance(module, FSDPModule)]
    apart = [layer for layer in layers if not getattr(layer, "_kept_whole", False)]
    for layer in apart:
        layer._kept_whole = True
        layer.set_reshard_after_forward(False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in apart:
            layer._kept_whole = False
            layer.set_reshard_after_forward(True)
            layer.reshard()


def answering(model: PreTrainedModel):
    """A context in which a model answers and learns nothing.

    Adapters kept in fp32 are multiplied in the base's dtype, and PEFT casts no input to fp32. A mixture of experts adds
    up no loss of its router, which trainers ask it for and which knows no cache.
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
    """A context in which PEFT casts no adapter's input to fp32 and back. IA3 and SHiRA know no such casts."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    known = all(hasattr(layer, "cast_input_dtype_enabled") for layer in layers)
    return disable_input_dtype_casting(model, active=active and known)


def _read(model: PreTrainedModel, prompts, room: int = 0) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
    """Logits after each prompt, the attention mask of what was read, and the cache; a common beginning is read once.

    `room` tokens are to follow.
    """
    cache = DynamicCache(config=model.config)
    # Every prompt keeps a token of its own to be read.
    shortest = min(map(len, prompts)) - 1
    shared = next((i for i in range(shortest) if len({prompt[i] for prompt in prompts}) > 1), shortest)
    # Padding then stands behind the beginning, where it would push it out of a window.
    windowed = max(map(len, prompts)) + room > attention_window(model)
    shared = 0 if windowed or len(prompts) == 1 else shared
    ids, mask = _left_padded([prompt[shared:] for prompt in prompts], 0, model.device)
    if shared:
        beginning = torch.tensor([prompts[0][:shared]], device=model.device)
        _next(model, beginning, torch.ones_like(beginning), cache)
        cache.batch_repeat_interleave(len(prompts))
        mask = torch.cat([mask.new_ones(len(prompts), shared), mask], 1)
    return _next(model, ids, mask, cache), mask, cache


def _left_padded(prompts, filler: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = [[filler] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _generate(model, prompts, choose: Choose, *, ends, max_new_tokens, samples, stopped) -> list[list[int]]:
    """`complete` by `model.generate`, which knows virtual tokens and every kind of state.

    Padding may leak into a state that is not attention, so only equally long prompts are completed together there.
    """
    groups: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(0 if has_virtual_tokens(model) else len(prompt), []).append(number)
    completions: dict[int, list[list[int]]] = {}
    with answering(model), whole_base(model):
        for numbers in groups.values():
            ids, mask = _left_padded([prompts[i] for i in numbers for _ in range(samples)], ends[0], model.device)
            rows = torch.tensor([i * samples + k for i in numbers for k in range(samples)])
            written = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(ends),
                pad_token_id=ends[0],
                logits_processor=LogitsProcessorList([_Choice(choose, rows)]),
                stopping_criteria=StoppingCriteriaList([_Stopped(stopped, ids.shape[1])] if stopped else []),
            )
            tokens = [_until_end(row, ends, stopped) for row in written[:, ids.shape[1] :].tolist()]
            completions |= {i: tokens[place * samples :][:samples] for place, i in enumerate(numbers)}
    return [tokens for number in range(len(prompts)) for tokens in completions[number]]


class _Choice(LogitsProcessor):
    """Leaves the token that `choose` takes as the only possible one, so that `generate` draws by the given numbers."""

    def __init__(self, choose: Choose, rows: torch.Tensor):
        self.choose, self.rows, self.step = choose, rows, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = self.choose(scores, self.rows, self.step)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _Stopped(StoppingCriteria):
    """`stopped`, asked about each row's own tokens."""

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
    """Logits of the token after `ids`, shape (batch, vocabulary); the cache takes `ids` in."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


def _draw(logits: torch.Tensor, temperature: float, uniform: torch.Tensor) -> torch.Tensor:
    """One token a row by inverting the cumulative distribution: one random number a row, not one a vocabulary entry."""
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
    places = uniform.to(logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, places, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
