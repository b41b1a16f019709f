"""A faster replacement of TRL's fused head on CPUs: it scores answer tokens only and reads a shared prefix once.

TRL 1.16 skips positions without a label on Triton devices only. On a CPU, with a 49k vocabulary and short answers,
these positions take more than half of a training step. The result is the same. TRL's head stays for models whose
logits `checks` finds other than ours.
"""

import functools
import types

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from lorapar_utils.data.encoding import IGNORED
from lorapar_utils.fast.checks import answer_logits, shortcuts_of
from lorapar_utils.fast.shared_prefix import hidden_before


def use_answer_head(model: PreTrainedModel, temperature: float = 1.0) -> None:
    """Replace the `fused_lm_head=True` forward that a TRL trainer gave `model`, until `drop_trl_head` is called.

    Parameters
    ----------
    model
        The base model. The trainer must exist already.
    temperature
        Divides the logits, as in the trainer's head.
    """
    shortcuts = shortcuts_of(model)
    # A router loss needs TRL's head, which adds this loss.
    if not shortcuts.answer_head or getattr(model.config.get_text_config(), "output_router_logits", False):
        return
    trl_forward = model.forward

    # Keep the signature, because `generate` reads the accepted arguments from it.
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, num_items_in_batch=None, **kwargs):
        if not fused_lm_head:
            options = {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return trl_forward(*args, **kwargs, **{key: value for key, value in options.items() if value is not None})
        targets = labels[:, 1:]
        mask = targets != IGNORED
        kwargs.pop("use_cache", None)
        virtual = kwargs.get("inputs_embeds") is not None or kwargs.get("past_key_values") is not None
        if shortcuts.shared_prefix and not virtual:
            hidden = hidden_before(self.base_model, *args, scored=mask, **kwargs)
        else:
            hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state[:, :-1][mask]
        logits = answer_logits(self, hidden) / temperature
        log_probs = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            is_top1 = logits.argmax(-1) == targets[mask]

        def unmasked(values):
            """Values of the scored tokens in shape (B, T - 1), with zeros elsewhere."""
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        label_log_probs = unmasked(log_probs.gather(1, targets[mask].unsqueeze(1)).squeeze(1))
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch  # of all micro-batches
        return FusedCausalLMOutput(
            loss=-label_log_probs.sum() / count,
            log_probs=label_log_probs,
            entropy=unmasked(entropy),
            is_top1=unmasked(is_top1),
            label_mask=mask,
        )

    model.forward = types.MethodType(forward, model)


def drop_trl_head(model: PreTrainedModel) -> None:
    """Restore the forward of the model's class, because TRL does not remove the replacement."""
    model.__dict__.pop("forward", None)
