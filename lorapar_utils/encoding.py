"""The one way from a question to tokens: teachers, importance, SFT, GRPO and every evaluation read the same ids.

A model with a chat template reads the question as a user's turn; where the template knows no system turn, the system
prompt opens the user's. A model without one reads `model.plain_template`. BOS stands in front once, where the tokenizer
adds it, and a template that writes the date is told a fixed day: prompts do not change overnight.
"""

import functools
from collections.abc import Iterable

import jinja2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorapar_utils.errors import InputError
from lorapar_utils.settings import Settings

IGNORED = -100
PLAIN_TEMPLATE = "{% if system %}{{ system }}\n\n{% endif %}Question: {{ prompt }}\nAnswer:\n"
# In front of a chat template that asks for the date: the day that Llama's own templates write without a clock.
FIXED_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro %}"

# What a model's own template may raise; it is a program that somebody else wrote.
TEMPLATE_FAULTS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def prompt_ids(question: str, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[int]:
    """Token ids of a question to the profile's model, ready for the answer (`settings.system_prompt` in front)."""
    return question_ids(
        question, tokenizer, system=settings.system_prompt, plain_template=settings.model.plain_template
    )


def question_ids(
    question: str, tokenizer: PreTrainedTokenizerBase, *, system: str = "", plain_template: str = PLAIN_TEMPLATE
) -> list[int]:
    """Token ids of a question to any model, ready for the answer.

    Parameters
    ----------
    system
        The system prompt; "" for none.
    plain_template
        What a model without a chat template reads: Jinja over `system` and `prompt`.

    Raises
    ------
    InputError
        A template, the model's or this one, that cannot be filled in.
    """
    if not tokenizer.chat_template:
        # A question that quotes `</s>`, as HTML does, reads it as text; a template may write control tokens.
        own = any(token in plain_template for token in tokenizer.all_special_tokens)
        return continuation_ids(_plain_text(plain_template, system, question), tokenizer, as_text=not own)
    ids, front = _chat_ids(question, system, tokenizer), _front(tokenizer)
    return ids if ids[: len(front)] == front else front + ids


def continuation_ids(text: str, tokenizer: PreTrainedTokenizerBase, *, as_text: bool = False) -> list[int]:
    """Token ids of text that is to be continued: what the tokenizer puts in front of it (BOS), nothing behind it.

    Some fine-tunes leave a tokenizer that ends every text with its end token; a model would take that for the end.

    Parameters
    ----------
    as_text
        Whether control tokens that stand in the text are read as text like any other.
    """
    options = {"split_special_tokens": True} if as_text else {}
    own = tokenizer(text, add_special_tokens=False, **options).input_ids
    front = _front(tokenizer)
    return own if own[: len(front)] == front else front + own


def _front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of a text by itself: BOS, or nothing."""
    own = tokenizer("1", add_special_tokens=False).input_ids
    whole = tokenizer("1").input_ids
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(own)] == own), [])


def answer_ids(solution: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of an answer and the end of its turn; `</s>` within it, as HTML has it, is text like any other."""
    return [*tokenizer(solution, add_special_tokens=False, split_special_tokens=True).input_ids, tokenizer.eos_token_id]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's, and all that the model's generation config declares."""
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    return [token for token in dict.fromkeys([tokenizer.eos_token_id, *declared]) if token is not None]


def check_prompts(tokenizer: PreTrainedTokenizerBase, plain_template: str) -> None:
    """Whether a question comes back out of the prompt that it is put into; some templates lose it without a word.

    Raises
    ------
    InputError
        It does not, as where a chat template wants content as a list of parts.
    """
    question = "1 + 1"
    ids = question_ids(question, tokenizer, plain_template=plain_template)
    # As the tokenizer itself gives it back: a small vocabulary may not know these words.
    known = tokenizer.decode(tokenizer(question, add_special_tokens=False).input_ids)
    if "".join(known.split()) not in "".join(tokenizer.decode(ids).split()):
        kind = "its chat template" if tokenizer.chat_template else "model.plain_template"
        raise InputError(
            f"model: a question is lost in {kind}: the prompt reads {tokenizer.decode(ids)[:200]!r}; mend it"
        )


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token by which the chat template ends an assistant's turn; None where it writes none."""
    if not tokenizer.chat_template:
        return None
    answer = "0"
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=_dated(tokenizer))
    except TEMPLATE_FAULTS:
        return None
    # Some fine-tunes added theirs as an ordinary token. Phi-1.5's runs of spaces are added ones too.
    special = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()
    }
    after = tokenizer(text[text.rfind(answer) + len(answer) :], add_special_tokens=False).input_ids
    return next((token for token in after if token in special), None)


def encode_examples(
    examples: Iterable[dict], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> list[dict[str, list[int]]]:
    """Prompt, solution and end of turn as token ids, with labels on the answer tokens only.

    Parameters
    ----------
    examples
        Rows of the pool: `id`, `prompt`, `solution`.
    settings
        `sft.max_length`, and `sft.long_rows`, which says what becomes of a longer row.

    Returns
    -------
    list of {"input_ids", "labels"}
        Equal lengths, at most `sft.max_length`; labels are -100 on the prompt. How many rows were left out is printed.

    Raises
    ------
    InputError
        No example at all, a long row where `sft.long_rows` refuses it, or nothing but long rows.
    """
    sft = settings.sft
    encoded, long_rows = [], []
    for example in examples:
        prompt = prompt_ids(example["prompt"], tokenizer, settings)
        answer = answer_ids(example["solution"], tokenizer)
        room = sft.max_length - len(prompt)
        if len(answer) > room and (sft.long_rows != "truncate" or room <= 0):
            long_rows.append(f"{example['id']} ({len(prompt)} + {len(answer)} tokens)")
            continue
        encoded.append(
            {
                "input_ids": (prompt + answer)[: sft.max_length],
                "labels": ([IGNORED] * len(prompt) + answer)[: sft.max_length],
            }
        )
    if long_rows and (sft.long_rows == "refuse" or not encoded):
        raise InputError(
            f"examples: {len(long_rows)} of {len(encoded) + len(long_rows)} are longer than sft.max_length = "
            f"{sft.max_length}, first {long_rows[0]}; raise it, or set sft.long_rows to drop or truncate"
        )
    if long_rows:
        print(
            f"{len(long_rows)} of {len(encoded) + len(long_rows)} examples are longer than sft.max_length = "
            f"{sft.max_length} and left out, first {long_rows[0]}"
        )
    if not encoded:
        raise InputError("examples: none were given; check the split and the votes")
    return encoded


def _chat_ids(question: str, system: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    user = {"role": "user", "content": question}
    if system:
        turns = [{"role": "system", "content": system}, user]
        # A template may refuse a system turn (Gemma-2, Mistral), or pass over it in silence (Phi-3).
        if not _writes_system_turn(tokenizer):
            turns = [{"role": "user", "content": f"{system}\n\n{question}"}]
    else:
        turns = [user]
    # A question that quotes a control token reads it as text.
    return _rendered(tokenizer, turns, tokenize=True, sanitize_control_tokens=True, return_dict=True)["input_ids"]


def _writes_system_turn(tokenizer: PreTrainedTokenizerBase) -> bool:
    word = "lorapar"
    turns = [{"role": "system", "content": word}, {"role": "user", "content": "1"}]
    try:
        return word in tokenizer.apply_chat_template(turns, tokenize=False, chat_template=_dated(tokenizer))
    except TEMPLATE_FAULTS:
        return False


def _dated(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template, with a day that is always the same."""
    return FIXED_DAY + tokenizer.get_chat_template()


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict], **options):
    try:
        template = _dated(tokenizer)
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, chat_template=template, **options)
    except TEMPLATE_FAULTS as error:
        raise InputError(
            f"model: its chat template cannot be filled in ({error}); mend chat_template in the model's folder, or "
            "remove it there to have model.plain_template read"
        ) from None


@functools.cache
def _template(source: str) -> jinja2.Template:
    return jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(source)


def _plain_text(template: str, system: str, question: str) -> str:
    try:
        return _template(template).render(system=system, prompt=question)
    except jinja2.TemplateError as error:
        raise InputError(f"model.plain_template: {error}; it may use system and prompt") from None
