"""A teacher that is the target itself: what it cannot answer is slow (ours, a control for Table 1)."""

import math
import zlib
from collections.abc import Callable, Sequence

import torch

from lorapar_utils.data import answers
from lorapar_utils.data.encoding import end_tokens, prompt_ids
from lorapar_utils.errors import InputError
from lorapar_utils.fast.completions import complete, uniform
from lorapar_utils.fast.decoding import whole_base
from lorapar_utils.settings import Settings, SuccessTeacher
from lorapar_utils.voting.ballots import Ballot, Teacher


def success_teacher(section: SuccessTeacher, key: str, settings: Settings, load: Callable) -> Teacher:
    """Sample completions of each question; the margin is the log-odds of a wrong one, read leniently.

    Half a completion is added to either side, so that the margin is finite. A question's random numbers are its own, so
    its vote does not depend on what else is asked.

    Parameters
    ----------
    key
        See `Teacher`.
    load
        `load(None, None)` gives the target and its tokenizer.

    Raises
    ------
    InputError
        The pool's answers are free text, which cannot be right or wrong.
    """
    if settings.has_free_text:
        raise InputError(
            f"voting.teachers: {section.name}: kind = 'success' needs answers that can be checked, and those of "
            f"{settings.pool.source} are free text; use local, api or recorded teachers"
        )
    limit = section.max_new_tokens

    def ask(asked: Sequence[dict], answered: Callable[[int, Ballot], None]) -> None:
        model, tokenizer = load(None, None)
        ends, size = end_tokens(model, tokenizer), max(1, settings.voting.batch_size // section.completions)
        with whole_base(model.eval()):
            for start in range(0, len(asked), size):
                rows = asked[start : start + size]
                draws = [uniform(section.completions, limit, zlib.crc32(row["prompt"].encode())) for row in rows]
                completions = complete(
                    model,
                    [prompt_ids(row["prompt"], tokenizer, settings) for row in rows],
                    ends=ends,
                    max_new_tokens=limit,
                    samples=section.completions,
                    temperature=1.0,
                    draws=torch.cat(draws),
                )
                texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
                for i, row in enumerate(rows):
                    own = texts[i * section.completions :][: section.completions]
                    right = sum(answers.leniently(text, row["answer"]) for text in own)
                    margin = math.log((len(own) - right + 0.5) / (right + 0.5))
                    answered(start + i, Ballot(margin=margin))

    return Teacher(section.name, key, lambda example: f"{example['prompt']}\n{example['answer']}", ask)
