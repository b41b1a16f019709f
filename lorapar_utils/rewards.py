"""Pure reward and scoring functions over completion text (paper, section 3.4).

Deviation: the paper uses `<reasoning>/<answer>` tags in the RL stage and `#### n` in evaluation. Here SFT, GRPO and
evaluation share one layout, `steps` then `#### answer`, so no stage is scored in a format that it was not trained in.
"""

import functools
import re

from lorapar_utils.answers import answers_match, mentions

__all__ = ["answers_match", "correctness", "extract_answer", "layout", "mentions", "overlap", "step_share"]

FINAL = re.compile(r"####[ \t]*([^\n]+)")


def extract_answer(completion: str) -> str | None:
    """The text after the first `####`, or None without one."""
    final = FINAL.search(completion)
    return final.group(1).strip() if final else None


def correctness(completion: str, reference: str | None) -> float | None:
    """2.0 for the right final answer, else 0.0; None if there is no usable reference (paper's reward 1)."""
    if reference is None or not reference.strip():
        return None
    answer = extract_answer(completion)
    return 2.0 if answer is not None and answers_match(answer, reference) else 0.0


def overlap(completion: str, reference: str | None) -> float | None:
    """How much of the reference's wording the completion shares, in [0, 1]; the paper has no reward for free text.

    Dolly, Open-Platypus and CodeAlpaca have no answers that can be checked. The score is chrF, the overlap of sequences
    of one to six characters. It needs no tokenizer, so it works for code and any script, whereas ROUGE's usual package
    drops all but `[a-z0-9]`. Precision counts as much as recall (beta = 1 instead of chrF's usual 2), so that long
    completions gain nothing. White space does not count.

    Returns
    -------
    float or None
        1.0 for the reference itself; None if there is no usable reference.
    """
    if reference is None or not reference.strip():
        return None
    return _chrf().sentence_score(completion, [reference]).score / 100


def layout(completion: str) -> float:
    """0.5 for a completion that ends with exactly one `#### answer` line, else 0.0 (paper's format rewards)."""
    lines = completion.strip().splitlines()
    answers = [line for line in lines if line.startswith("####")]
    return 0.5 if len(answers) == 1 and lines[-1] == answers[0] and extract_answer(completion) else 0.0


def step_share(completion: str, solution: str | None) -> float | None:
    """The share of the reference's steps that the completion states correctly, in order, in [0, 1].

    Deviation: the paper has no such reward. With a pass/fail reward most groups of a small model have no advantage, and
    training learns nothing from them.
    """
    if solution is None:
        return None
    steps = [line for line in solution.splitlines() if line and not line.startswith("####")]
    if not steps:
        return None
    lines = completion.strip().splitlines()
    right = 0
    for step, line in zip(steps, lines, strict=False):
        if step.strip() != line.strip():
            break
        right += 1
    return right / len(steps)


@functools.cache
def _chrf():
    from sacrebleu.metrics import CHRF  # only where there is free text

    return CHRF(beta=1)
