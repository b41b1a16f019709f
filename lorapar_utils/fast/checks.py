"""Which of our shortcuts a model supports. Each is compared with the model's own forward on two short sequences.

A shortcut may give other logits, for instance because the model has state other than attention, or changes logits after
the head in an unknown way. This model then uses the libraries' plain path, and one printed line says so. The check runs
when a model is loaded, and the result is stored on the model.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lorapar_utils.errors import InputError
from lorapar_utils.fast import shared_prefix
from lorapar_utils.fast.architecture import attention_window, has_other_states
from lorapar_utils.fast.decoding import answering, decode
from lorapar_utils.settings import SHORTCUTS

# Largest root-mean-square difference of a token's logits that rounding explains, relative to the logits' standard
# deviation. In bf16 the packaged model reaches 0.04.
TOLERANCE = {torch.float32: 3e-4, torch.float64: 1e-6}
LOW_PRECISION = 0.06
# Lengths in tokens: shared prefix, rest of each sequence, extra prompt tokens of the second sequence. They are very
# different, so that padding in the wrong position changes the logits a lot.
SHARED, OWN, LONGER = 5, (4, 20), 12


@dataclass(frozen=True)
class Shortcuts:
    """Which shortcuts reproduce the model's own logits.

    Attributes
    ----------
    answer_head
        Logits of the scored tokens only, from the hidden states.
    shared_prefix
        Sequences with a shared prefix in one row.
    completions
        Completions by our decoding loop.
    """

    answer_head: bool
    shared_prefix: bool
    completions: bool


@torch.no_grad()
def shortcuts_of(model: PreTrainedModel | PeftModel, wanted: Collection[str] = SHORTCUTS) -> Shortcuts:
    """The shortcuts that `model` supports.

    The first call tests them; of those that the model supports, `wanted` are taken from then on.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not hasattr(base, "_shortcuts"):
        training = base.training
        base.eval()
        try:
            base._shortcuts = _tested(base, wanted)
        finally:
            base.train(training)
    return base._shortcuts


def answer_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits, fp32, shape (N, vocabulary), from last hidden states: the head, then the configured scale and soft cap.

    Parameters
    ----------
    model
        The base model.
    hidden : shape (N, hidden size)
    """
    logits = model.get_output_embeddings()(hidden).float()
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere
    if scale is None and getattr(config, "logits_scaling", None):  # Granite
        scale = 1 / config.logits_scaling
    logits = logits if scale is None else logits * scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma-2
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _tested(model: PreTrainedModel, wanted: Collection[str]) -> Shortcuts:
    sequences = _sequences(model)
    with answering(model):
        plain = [model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in sequences]
        if not all(logits.isfinite().all() for logits in plain):
            raise InputError(
                f"model: the logits of {type(model).__name__} are not finite in {model.dtype}; its weights hold NaN or "
                "infinity, or need another model.dtype"
            )
        _check_causal(model, *(logits[: SHARED - 1] for logits in plain))
        expected = torch.cat([logits[SHARED - 1 : -1] for logits in plain])
        attempts = {"answer_head": _by_head, "shared_prefix": _in_one_row, "completions": _token_by_token}
        attempts = {name: attempt for name, attempt in attempts.items() if name in wanted}
        equal = {name: _agrees(attempt, model, sequences, expected) for name, attempt in attempts.items()}
    if not equal.get("completions"):
        _check_generate(model, sequences[0])
    if unsupported := [name for name in attempts if not equal[name]]:
        print(
            f"{type(model).__name__}: {', '.join(unsupported)} by the libraries' own path, because ours differs there"
        )
    return Shortcuts(**{name: equal.get(name, False) for name in Shortcuts.__dataclass_fields__})


def _check_causal(model: PreTrainedModel, first: torch.Tensor, second: torch.Tensor) -> None:
    """Compare two sequences' logits on the shared prefix. Only an encoder sees the different tokens after it."""
    difference = (first - second).square().mean().sqrt()
    if difference > TOLERANCE.get(model.dtype, LOW_PRECISION) * first.std():
        raise InputError(
            f"model: {type(model).__name__} reads what comes after a token before it predicts it, as encoders do; it "
            "can write nothing; take a causal language model"
        )


def _check_generate(model: PreTrainedModel, ids: torch.Tensor) -> None:
    try:
        model.generate(
            input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=2, do_sample=False
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise InputError(
            f"model: transformers' own generate fails with {type(model).__name__} "
            f"({str(error).splitlines()[0][:200]}), so it can neither answer nor be reinforced; take another model"
        ) from None


def _agrees(attempt: Callable, model: PreTrainedModel, sequences: list[torch.Tensor], expected: torch.Tensor) -> bool:
    try:
        logits = attempt(model, sequences).float()
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False
    tolerance = TOLERANCE.get(model.dtype, LOW_PRECISION)
    if getattr(model, "is_loaded_in_4bit", False):
        tolerance = LOW_PRECISION
    difference = (logits.log_softmax(-1) - expected.log_softmax(-1)).square().mean(-1).sqrt().max()
    return bool(difference <= tolerance * expected.std())


def _sequences(model: PreTrainedModel) -> list[torch.Tensor]:
    """Two sequences of ordinary tokens with a shared prefix: LongTensors, shape (SHARED + OWN[i],)."""
    config = model.config.get_text_config()
    special = {getattr(config, "bos_token_id", None), getattr(config, "pad_token_id", None)}
    for ends in (getattr(config, "eos_token_id", None), model.generation_config.eos_token_id):
        special |= set(ends) if isinstance(ends, list) else {ends}
    ordinary = torch.tensor([token for token in range(min(config.vocab_size, 5000)) if token not in special])
    generator = torch.Generator().manual_seed(0)
    tokens = ordinary[torch.randint(len(ordinary), (SHARED + sum(OWN),), generator=generator)].to(model.device)
    shared, first, second = tokens.split([SHARED, *OWN])
    return [torch.cat([shared, first]), torch.cat([shared, second])]


def _by_head(model: PreTrainedModel, sequences: list[torch.Tensor]) -> torch.Tensor:
    hidden = [model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in sequences]
    return torch.cat([answer_logits(model, states[SHARED - 1 : -1]) for states in hidden])


def _in_one_row(model: PreTrainedModel, sequences: list[torch.Tensor]) -> torch.Tensor:

    if has_other_states(model):
        raise ValueError("a convolution or recurrence runs on from one sequence of a row into the next")
    if attention_window(model) < shared_prefix.LONGEST:
        raise ValueError("a bundle's mask knows no window")
    width = max(map(len, sequences))
    ids = torch.stack([torch.nn.functional.pad(tokens, (0, width - len(tokens))) for tokens in sequences])
    mask = torch.stack([(torch.arange(width, device=ids.device) < len(tokens)).long() for tokens in sequences])
    scored = mask[:, 1:].bool()
    scored[:, : SHARED - 1] = False
    return answer_logits(model, shared_prefix.hidden_before(model.base_model, ids, mask, scored))


def _token_by_token(model: PreTrainedModel, sequences: list[torch.Tensor]) -> torch.Tensor:
    """Logits of `decoding.decode` with given tokens: two prompts of unequal length, two samples each."""
    if has_other_states(model):
        raise ValueError("padding runs on into such a state")
    prompt_lengths = (SHARED, SHARED + LONGER)
    prompts = [ids[:length].tolist() for length, ids in zip(prompt_lengths, sequences, strict=True)]
    completions = [ids[length:] for length, ids in zip(prompt_lengths, sequences, strict=True)]
    step_logits: dict[tuple[int, int], torch.Tensor] = {}

    def choose(logits: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        tokens = []
        for row, row_logits in zip(rows.tolist(), logits, strict=True):
            step_logits[row, step] = row_logits
            tokens.append(completions[row // 2][min(step, len(completions[row // 2]) - 1)])
        return torch.stack(tokens)

    lengths = [len(tokens) for tokens in completions]
    # The shorter completion leaves the batch before the longer one.
    decode(
        model,
        prompts,
        choose,
        ends=[-1],
        max_new_tokens=max(lengths),
        samples=2,
        stopped=lambda tokens: len(tokens) >= lengths[0] and tokens == completions[0].tolist(),
    )
    logits = []
    for number, ids in enumerate(sequences):
        plain = model(input_ids=ids[None], use_cache=False).logits[0].float()
        # The loop gives no logits inside a prompt, so these are the model's own.
        logits += list(plain[SHARED - 1 : len(prompts[number]) - 1])
        logits += [step_logits[2 * number + 1, step].float() for step in range(lengths[number])]
    return torch.stack(logits)
