"""The decoding loop: a prefix that all prompts share is read once, and a finished row leaves the batch."""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, PreTrainedModel

from lorapar_utils.fast.architecture import attention_window

# Maps (logits, row indices, step) to the next tokens.
Choose = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


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
        logits, mask, cache = read(model, prompts, read_prefix(model, prompts, max_new_tokens))
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


class Prefix(NamedTuple):
    """The number of tokens that prompts share at their beginning, and the cache after these tokens."""

    length: int
    cache: DynamicCache


def read_prefix(model: PreTrainedModel, prompts: Sequence[Sequence[int]], room: int = 0) -> Prefix:
    """Read the prefix that all prompts share, once. `room` more tokens will follow each prompt."""
    # Leave at least one token out of the shared prefix, so that each prompt gives logits.
    shortest = min(map(len, prompts)) - 1
    shared = next((i for i in range(shortest) if len({prompt[i] for prompt in prompts}) > 1), shortest)
    # Padding comes after the shared prefix and would push this prefix out of an attention window.
    windowed = max(map(len, prompts)) + room > attention_window(model)
    shared = 0 if windowed or len(prompts) == 1 else shared
    cache = DynamicCache(config=model.config)
    if shared:
        tokens = torch.tensor([prompts[0][:shared]], device=model.device)
        _next(model, tokens, torch.ones_like(tokens), cache)
    return Prefix(shared, cache)


def read(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], prefix: Prefix
) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
    """Logits after each prompt (prompts, vocabulary), attention mask and cache. The prefix's cache is used up."""
    ids, mask = left_padded([prompt[prefix.length :] for prompt in prompts], 0, model.device)
    if prefix.length:
        prefix.cache.batch_repeat_interleave(len(prompts))
        mask = torch.cat([mask.new_ones(len(prompts), prefix.length), mask], 1)
    return _next(model, ids, mask, prefix.cache), mask, prefix.cache


def _next(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Logits of the token after `ids`, shape (batch, vocabulary). Adds `ids` to the cache."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, **options).logits[:, -1]


def left_padded(prompts, filler: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = [[filler] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


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
