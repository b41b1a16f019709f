"""What asking the teachers will cost, before anything is asked."""

from collections.abc import Sequence

import datasets
import diskcache
import numpy as np
import pandas as pd

from lorapar_utils.voting.ballots import Teacher, kept_ballot, keys_of

CHARACTERS_PER_TOKEN = 4  # a rule of thumb for English, used by the dry run only


def plan(pool: datasets.Dataset, teachers: Sequence[Teacher], cache: diskcache.Cache) -> pd.DataFrame:
    """The cost of `vote` without asking: one row per teacher, with questions to ask, tokens and maximal cost.

    Votes that are read from a file are no questions, and a local model's tokens cost nothing. Prompt tokens are
    estimated from characters. Completion tokens are bounded by `max_tokens`, and estimated from the teacher's cached
    answers, if any. A question that two examples or teachers share counts once.
    """
    rows = []
    planned: set[str] = set()
    for teacher in teachers:
        keys = keys_of(teacher, list(pool))
        ballots = [kept_ballot(teacher, key, cache) for key in keys]
        texts = []
        for example, key, ballot in zip(pool, keys, ballots, strict=True):
            if ballot is None and (key is None or key not in planned):
                texts.append(teacher.prompt(example))
                planned |= {key} - {None}
        answers = [ballot for ballot in ballots if ballot is not None]
        prompts = round(sum(map(len, texts)) / CHARACTERS_PER_TOKEN)
        bound = len(texts) * teacher.max_tokens
        mean = np.mean([ballot.tokens_out for ballot in answers]) if answers else teacher.max_tokens
        rows.append(
            {
                "teacher": teacher.name,
                "examples": len(keys),
                "already answered": len(answers),
                "to ask": len(texts) if teacher.key else 0,
                "prompt tokens, about": prompts,
                "completion tokens, at most": bound,
                "completion tokens, likely": round(len(texts) * float(mean)),
                "cost at most, in the prices' currency": round(
                    (prompts * teacher.price_in + bound * teacher.price_out) / 1e6, 4
                ),
            }
        )
    return pd.DataFrame(rows)
