"""Pure reward and scoring functions over completion text (paper, section 3.4).

Deviation: the paper's layout is `<reasoning>/<answer>` tags in the RL stage and `#### n` in evaluation. Here
one layout, `steps` then `#### answer`, serves SFT, GRPO and evaluation, so a stage is never scored in a format
that it was not trained in.
"""

import re

FINAL = re.compile(r"####[ \t]*([^\n]+)")
NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(?:\.\d+)?")


def extract_answer(completion: str) -> str | None:
    """The text after the first `####`, or None where the completion has none."""
    found = FINAL.search(completion)
    return found.group(1).strip() if found else None


def answers_match(candidate: str, reference: str) -> bool:
    """Equal as numbers if both are numbers (commas, dollars and trailing zeros aside), else as words."""
    left, right = _as_number(candidate), _as_number(reference)
    if left is not None and right is not None:
        return left == right
    return _as_words(candidate) == _as_words(reference)


def mentions(completion: str, reference: str) -> bool:
    """Whether the reference stands anywhere in the completion, as a whole word or number."""
    return re.search(rf"(?<![\w.-]){re.escape(reference)}(?!\w)", completion, re.IGNORECASE) is not None


def correctness(completion: str, reference: str | None) -> float | None:
    """2.0 for the right final answer, else 0.0; None if there is no usable reference (paper's reward 1)."""
    if reference is None or not reference.strip():
        return None
    answer = extract_answer(completion)
    return 2.0 if answer is not None and answers_match(answer, reference) else 0.0


def layout(completion: str) -> float:
    """0.5 for a completion that ends with exactly one `#### answer` line, else 0.0 (paper's format rewards)."""
    lines = completion.strip().splitlines()
    marked = [line for line in lines if line.startswith("####")]
    return 0.5 if len(marked) == 1 and lines[-1] == marked[0] and extract_answer(completion) else 0.0


def step_share(completion: str, solution: str | None) -> float | None:
    """The share of the reference's steps that the completion states correctly, in order, in [0, 1].

    Deviation: the paper has no such reward. A pass/fail reward leaves most groups of a small model without
    advantage, and a group without advantage teaches nothing.
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


def _as_number(text: str) -> float | None:
    text = text.strip().rstrip(".").replace(" ", "")
    if not NUMBER.fullmatch(text):
        return None
    return float(text.replace(",", "").replace("$", ""))


def _as_words(text: str) -> str:
    return re.sub(r"[^\w ]", "", text.casefold()).strip()
