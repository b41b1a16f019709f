"""Text to tokens, once for all: importance, SFT, GRPO and evaluation see the same prompt."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from lorapar_utils.data import chat_messages
from lorapar_utils.errors import InputError
from lorapar_utils.settings import Settings

IGNORED = -100


def prompt_text(prompt: str, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> str:
    """The prompt in the model's chat format, ready for the answer; plain text if it has no chat template."""
    if tokenizer.chat_template is None:
        return f"{settings.model.system_prompt}\n\n{prompt}\n"
    return tokenizer.apply_chat_template(chat_messages(prompt, settings), tokenize=False, add_generation_prompt=True)


def encode_examples(
    examples: Iterable[dict], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> list[dict[str, list[int]]]:
    """Prompt + solution + end of turn as token ids, with labels on the answer tokens only.

    Returns
    -------
    list of {"input_ids", "labels"}
        Equal lengths, at most `sft.max_length`; labels are -100 on the prompt.

    Raises
    ------
    InputError
        No example at all, or a prompt so long that no answer token is left.
    """
    encoded = []
    for example in examples:
        prompt_ids = tokenizer(prompt_text(example["prompt"], tokenizer, settings), add_special_tokens=False).input_ids
        answer_ids = [*tokenizer(example["solution"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if len(prompt_ids) >= settings.sft.max_length:
            raise InputError(
                f"example {example['id']}: its prompt has {len(prompt_ids)} tokens, which leaves no answer token "
                f"within sft.max_length = {settings.sft.max_length}; raise it or drop the example"
            )
        input_ids = (prompt_ids + answer_ids)[: settings.sft.max_length]
        labels = ([IGNORED] * len(prompt_ids) + answer_ids)[: settings.sft.max_length]
        encoded.append({"input_ids": input_ids, "labels": labels})
    if not encoded:
        raise InputError("examples: none were given; check the split and the votes")
    return encoded
