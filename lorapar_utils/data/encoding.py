"""Questions to token ids. Teachers, importance, SFT, GRPO and every evaluation use the same functions.

With a chat template, the question is a user turn. If the template has no system turn, the system prompt goes before the
question. Without a chat template, the question fills `model.plain_template`. There is one BOS token if the tokenizer
adds one. A template that writes the date gets a fixed day, so that prompts do not change overnight.
"""

import functools
from collections.abc import Iterable

import jinja2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorapar_utils.errors import InputError
from lorapar_utils.settings import Settings

# The label of a token without a loss, as in torch's cross_entropy.
IGNORED = -100
PLAIN_TEMPLATE = "{% if system %}{{ system }}\n\n{% endif %}Question: {{ prompt }}\nAnswer:\n"
# Goes before a chat template. Llama's templates write this day if they get no date.
FIXED_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro %}"

# A chat template is a program by the model's authors and may raise any of these.
TEMPLATE_FAULTS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def prompt_ids(question: str, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[int]:
    """Token ids of the profile's system prompt and a question, up to where the answer begins."""
    return question_ids(
        question, tokenizer, system=settings.system_prompt, plain_template=settings.model.plain_template
    )


def question_ids(
    question: str, tokenizer: PreTrainedTokenizerBase, *, system: str = "", plain_template: str = PLAIN_TEMPLATE
) -> list[int]:
    """Token ids of a question for any model, up to where the answer begins.

    Parameters
    ----------
    system
        The system prompt; "" for none.
    plain_template
        Jinja template over `system` and `prompt`, for a model without a chat template.

    Raises
    ------
    InputError
        The chat template or `plain_template` cannot be filled in.
    """
    if not tokenizer.chat_template:
        # A question may quote `</s>` (HTML), which must stay text, unless the template itself uses control tokens.
        has_control = any(token in plain_template for token in tokenizer.all_special_tokens)
        return continuation_ids(_plain_text(plain_template, system, question), tokenizer, as_text=not has_control)
    ids, front = _chat_ids(question, system, tokenizer), _front(tokenizer)
    return ids if ids[: len(front)] == front else front + ids


def continuation_ids(text: str, tokenizer: PreTrainedTokenizerBase, *, as_text: bool = False) -> list[int]:
    """Token ids of a text that the model is to continue: BOS if the tokenizer adds it, and no end token.

    Tokenizers of some fine-tunes add an end token to every text, after which a model would write nothing.

    Parameters
    ----------
    as_text
        Whether control tokens in the text are read as ordinary text.
    """
    options = {"split_special_tokens": True} if as_text else {}
    ids = tokenizer(text, add_special_tokens=False, **options).input_ids
    front = _front(tokenizer)
    return ids if ids[: len(front)] == front else front + ids


def _front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that the tokenizer adds before a text: BOS, or none."""
    plain = tokenizer("1", add_special_tokens=False).input_ids
    full = tokenizer("1").input_ids
    return next((full[:i] for i in range(len(full)) if full[i : i + len(plain)] == plain), [])


def answer_ids(solution: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of an answer and the end token. A `</s>` inside the answer (HTML) is read as ordinary text."""
    return [*tokenizer(solution, add_special_tokens=False, split_special_tokens=True).input_ids, tokenizer.eos_token_id]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's end token, then those of the model's generation config."""
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    return [token for token in dict.fromkeys([tokenizer.eos_token_id, *declared]) if token is not None]


def check_prompts(tokenizer: PreTrainedTokenizerBase, plain_template: str) -> None:
    """Check that a prompt contains the question, because some templates silently drop the question.

    Raises
    ------
    InputError
        The question is missing, for instance because the chat template expects content as a list of parts.
    """
    question = "1 + 1"
    ids = question_ids(question, tokenizer, plain_template=plain_template)
    # Decoded from tokens, because a small vocabulary may lack some of these characters.
    decoded = tokenizer.decode(tokenizer(question, add_special_tokens=False).input_ids)
    if "".join(decoded.split()) not in "".join(tokenizer.decode(ids).split()):
        kind = "its chat template" if tokenizer.chat_template else "model.plain_template"
        raise InputError(
            f"model: a question is lost in {kind}: the prompt reads {tokenizer.decode(ids)[:200]!r}; mend it"
        )


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template ends an assistant turn; None if there is none."""
    if not tokenizer.chat_template:
        return None
    answer = "0"
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=_dated(tokenizer))
    except TEMPLATE_FAULTS:
        return None
    # Some fine-tunes added the end token as an ordinary token. Phi-1.5 also has added tokens made of spaces only.
    special = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()
    }
    after = tokenizer(text[text.rfind(answer) + len(answer) :], add_special_tokens=False).input_ids
    return next((token for token in after if token in special), None)


def encode_examples(
    examples: Iterable[dict], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> list[dict[str, list[int]]]:
    """Token ids of prompt, solution and end token, with labels on the answer tokens only.

    Parameters
    ----------
    examples
        Rows of the pool: `id`, `prompt`, `solution`.
    settings
        `sft.max_length`, and `sft.long_rows`, which says how longer rows are treated.

    Returns
    -------
    list of {"input_ids", "labels"}
        Two lists of int of equal length, at most `sft.max_length`. Labels are -100 on the prompt. The number of dropped
        rows is printed.

    Raises
    ------
    InputError
        No examples, only long rows, or a long row with `sft.long_rows: refuse`.
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
        labels = [IGNORED] * len(prompt) + answer
        encoded.append({"input_ids": (prompt + answer)[: sft.max_length], "labels": labels[: sft.max_length]})
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
        # A template may refuse a system turn (Gemma-2, Mistral), or silently drop the turn (Phi-3).
        if not _writes_system_turn(tokenizer):
            turns = [{"role": "user", "content": f"{system}\n\n{question}"}]
    else:
        turns = [user]
    # Control tokens that a question quotes are read as text.
    return _rendered(tokenizer, turns, tokenize=True, sanitize_control_tokens=True, return_dict=True)["input_ids"]


def _writes_system_turn(tokenizer: PreTrainedTokenizerBase) -> bool:
    word = "lorapar"
    turns = [{"role": "system", "content": word}, {"role": "user", "content": "1"}]
    try:
        return word in tokenizer.apply_chat_template(turns, tokenize=False, chat_template=_dated(tokenizer))
    except TEMPLATE_FAULTS:
        return False


def _dated(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template with a fixed day."""
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
