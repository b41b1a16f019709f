"""Pure reward and scoring functions over completion text (paper, section 3.4).

Deviation: the paper uses `<reasoning>/<answer>` tags in the RL stage and `#### n` in evaluation. Here SFT, GRPO and
evaluation share one layout, `steps` then `#### answer`, so no stage is scored in a format that it was not trained in.
"""

from collections.abc import Callable

from lorapar_utils.data.answers import answers_match, extract_answer, overlap


def correctness(completion: str, reference: str | None) -> float | None:
    """2.0 for the right final answer, else 0.0; None if there is no usable reference (paper's reward 1)."""
    if reference is None or not reference.strip():
        return None
    answer = extract_answer(completion)
    return 2.0 if answer is not None and answers_match(answer, reference) else 0.0


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


def _logged_as(name: str, reward: Callable, column: str | None = None) -> Callable:
    """`reward` as TRL calls it: with the batch's completions and columns. TRL logs it under the function's name."""

    def rewards(completions, **columns):
        references = [()] * len(completions) if column is None else [(value,) for value in columns[column]]
        return [reward(text, *reference) for text, reference in zip(completions, references, strict=True)]

    rewards.__name__ = name
    return rewards


# Reward functions that are summed, by `grpo.reward`.
REWARDS = {
    "answer": [
        _logged_as("correct", correctness, "answer"),
        _logged_as("layout", layout),
        _logged_as("steps", step_share, "solution"),
    ],
    "overlap": [_logged_as("overlap", overlap, "solution")],
}
