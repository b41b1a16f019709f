"""Score answer tokens only, and read what sequences share once: TRL's fused head, on a CPU, does neither.

TRL 1.16 skips positions without a label on Triton devices alone. On a CPU with a 49k vocabulary and answers of a
few tokens the rest is more than half of a training step. Same result, fewer rows; TRL's head stays where a model's
logits are not what `shortcuts` knows.
"""

import functools
import types

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from lorapar_utils.bundles import hidden_before
from lorapar_utils.encoding import IGNORED
from lorapar_utils.shortcuts import answer_logits, shortcuts_of


def use_answer_head(model: PreTrainedModel, temperature: float = 1.0) -> None:
    """Replace the `fused_lm_head=True` forward that a TRL trainer gave `model` until `drop_trl_head`.

    Parameters
    ----------
    model
        The base model, after the trainer was built around it.
    temperature
        Logits are divided by it, as the trainer's head does.
    """
    shortcuts = shortcuts_of(model)
    # A router's own loss is added by TRL's head.
    if not shortcuts.head or getattr(model.config.get_text_config(), "output_router_logits", False):
        return
    trl_forward = model.forward

    # `generate` reads the signature to know what a model takes.
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, num_items_in_batch=None, **kwargs):
        if not fused_lm_head:
            given = {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return trl_forward(*args, **kwargs, **{key: value for key, value in given.items() if value is not None})
        targets = labels[:, 1:]
        mask = targets != IGNORED
        kwargs.pop("use_cache", None)
        virtual = kwargs.get("inputs_embeds") is not None or kwargs.get("past_key_values") is not None
        if shortcuts.bundles and not virtual:
            hidden = hidden_before(self.base_model, *args, scored=mask, **kwargs)
        else:
            hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state[:, :-1][mask]
        logits = answer_logits(self, hidden) / temperature
        log_probs = logits.log_softmax(-1)
        chosen = log_probs.gather(1, targets[mask].unsqueeze(1)).squeeze(1)
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            is_top1 = logits.argmax(-1) == targets[mask]

        def placed(values):
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        scored = placed(chosen)
        return FusedCausalLMOutput(
            # Over all micro-batches of a step where the trainer says how many tokens they hold.
            loss=-scored.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch),
            log_probs=scored,
            entropy=placed(entropy),
            is_top1=placed(is_top1),
            label_mask=mask,
        )

    model.forward = types.MethodType(forward, model)


def drop_trl_head(model: PreTrainedModel) -> None:
    """Give `model` its class's own forward back; TRL leaves its patch behind."""
    model.__dict__.pop("forward", None)
