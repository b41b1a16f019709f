"""GSM8K and MMLU: scored as `lm-eval` scores them, item by item; what cannot be scored is named."""

import json

import pytest
from conftest import ROOT
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from lorapar_utils import data, evaluation, models
from lorapar_utils.cache import origin
from lorapar_utils.errors import InputError
from lorapar_utils.evaluation import accuracy
from lorapar_utils.evaluation.benchmarks import score_harness
from lorapar_utils.fast.lm_eval_model import LeanLM
from lorapar_utils.pipeline.record import experiment_record
from lorapar_utils.records import mean_outcomes
from lorapar_utils.settings import load_profile

REAL = ROOT.parent / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the GSM8K and MMLU files are not beside the project")
SUM = {"question": "What is 1,000 + 234?", "answer": "1,000 + 234 = <<1000+234=1234>>1,234\n#### 1,234"}
CHOICE = {"question": "2 + 2?", "subject": "anatomy", "choices": ["1", "2", "3", "4"], "answer": 3}


class Scripted(LM):
    """A model that says what it was told to say, in order."""

    def __init__(self, texts=(), logprobs=()):
        super().__init__()
        self.texts, self.logprobs = list(texts), list(logprobs)

    def generate_until(self, requests, disable_tqdm=False):
        return [self.texts.pop(0) for _ in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        return [(self.logprobs.pop(0), False) for _ in requests]

    loglikelihood_rolling = None  # neither benchmark asks for it


def benchmark(tmp_path, **tables):
    """A profile over tables of rows: train and test for GSM8K, dev and test for MMLU."""
    for split, rows in tables.items():
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = {"path": str(tmp_path), "shots": 1}
    return load_profile("smoke", evaluation={"gsm8k": asked, "mmlu": asked})


@pytest.mark.parametrize(
    "reference, completion, strict, flexible",
    [
        ("1,234", " 1000 + 234 = 1234\n#### 1234", True, True),
        ("1234", " #### 1,234", True, True),
        ("18", " She makes $18.\n#### $18", False, True),
        ("18", " #### 18 dollars", True, True),
        ("-5", " #### -5", True, True),
        ("5", " #### -5", False, False),
        ("2.5", " #### 2.5", True, True),
        ("18", " The answer is 18.", False, True),
        ("18", " #### 18\nThen 20 more", True, False),
        ("18", "", False, False),
        ("18", " I do not know", False, False),
    ],
)
def test_gsm8k_answers_are_read_by_the_filters_of_lm_eval(tmp_path, reference, completion, strict, flexible):
    settings = benchmark(tmp_path, train=[SUM], test=[{"question": "How many?", "answer": f"So.\n#### {reference}"}])
    [item] = score_harness(Scripted([completion]), "gsm8k", settings)
    assert (item["correct"], item["flexible"], item["completion"]) == (strict, flexible, completion)


def test_mmlu_takes_the_likeliest_letter_and_averages_over_subjects(tmp_path):
    virology = CHOICE | {"subject": "virology", "answer": 0}
    settings = benchmark(tmp_path, dev=[CHOICE, virology], test=[CHOICE, CHOICE, CHOICE, virology])
    right, wrong = [-9.0, -8.0, -7.0, -1.0], [-1.0, -8.0, -7.0, -9.0]
    items = score_harness(Scripted(logprobs=[*right, *wrong, *wrong, *wrong]), "mmlu", settings)
    assert [(item["task"], item["completion"], item["correct"]) for item in items] == [
        ("anatomy", "D", True),
        ("anatomy", "A", False),
        ("anatomy", "A", False),
        ("virology", "A", True),
    ]
    metrics = evaluation.benchmark_metrics("mmlu", items)
    assert metrics["accuracy"].value == 0.5 and metrics["macro"].value == pytest.approx(2 / 3)
    assert metrics["macro"].low < 2 / 3 < metrics["macro"].high and metrics["macro"].n == 4


@pytest.mark.parametrize(
    "name, tables, message",
    [
        ("gsm8k", {"test": [SUM]}, r"evaluation.gsm8k.path: .* has no split 'train'"),
        ("gsm8k", {}, r"evaluation.gsm8k.path: .* holds no .json"),
        ("gsm8k", {"train": [SUM], "test": [SUM | {"answer": "4"}]}, r"row 0 of test is malformed: .*no `#### number`"),
        ("gsm8k", {"train": [SUM], "test": [SUM | {"question": " "}]}, r"row 0 of test is malformed: question = ' '"),
        (
            "mmlu",
            {"dev": [CHOICE], "test": [CHOICE, CHOICE | {"answer": 4}]},
            r"row 1 of test .* answer = 4 is not one",
        ),
        ("mmlu", {"dev": [CHOICE], "test": [CHOICE | {"choices": ["1", "2"]}]}, r"choices = \['1', '2'\] are not four"),
        ("mmlu", {"dev": [], "test": [CHOICE]}, r"evaluation.mmlu.path"),
        ("mmlu", {"dev": [CHOICE | {"subject": "virology"}], "test": [CHOICE]}, r"shots = 1 of .*mmlu_anatomy.* has 0"),
        ("mmlu", {"dev": [CHOICE], "test": [CHOICE | {"subject": "alchemy"}]}, r"no task .*mmlu_alchemy"),
    ],
)
def test_a_benchmark_that_cannot_be_scored_is_named(tmp_path, name, tables, message):
    with pytest.raises(InputError, match=message):
        score_harness(Scripted(), name, benchmark(tmp_path, **tables))


def test_a_benchmark_has_no_validation_split(tmp_path):
    with pytest.raises(InputError, match=r"mmlu is scored on test only; choose settings on the pool's validation"):
        evaluation.evaluate(None, None, "mmlu", load_profile("smoke"), split="validation")


@needs_real_data
def test_real_items_score_as_with_the_stock_model_of_lm_eval(tmp_path):
    """Whole completions and letters of SmolLM2 in fp32; `benchmarks/harness.py` does it at length, and times it."""
    for name in ("dev", "test"):
        lines = (REAL / "mmlu" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        few = [line for line in lines if json.loads(line)["subject"].startswith(("a", "c"))]
        (tmp_path / f"{name}.jsonl").write_text("".join(few))
    subjects = len({json.loads(line)["subject"] for line in few})
    settings = load_profile(
        "laptop",
        model={"dtype": "float32"},
        evaluation={
            "gsm8k": {"path": str(REAL / "gsm8k"), "shots": 1, "items": 6, "max_new_tokens": 48},
            "mmlu": {"path": str(tmp_path), "shots": 1, "items": 1},
        },
    )
    model, tokenizer = models.load_base(settings)
    for name, size in (("gsm8k", 6), ("mmlu", subjects)):
        found = [
            score_harness(kind(pretrained=model, tokenizer=tokenizer, batch_size=8), name, settings)
            for kind in (LeanLM, HFLM)
        ]
        ours, theirs = ([{k: v for k, v in item.items() if k != "truncated"} for item in items] for items in found)
        assert ours == theirs and len(ours) == size
        if name == "gsm8k":
            # Stops by itself, or runs on to the limit: both happen, and only the second is called truncated.
            cut = [item["truncated"] for item in found[0]]
            assert 0 < sum(cut) < size
        else:
            assert len({item["completion"] for item in ours}) > 1


def test_an_experiment_keeps_what_its_stages_scored_elsewhere():
    """Under names of their own: a pool's accuracy counts no question of another benchmark."""
    settings = load_profile("smoke").for_experiment("lora_sft", 0)
    pool = [{"id": "a", "system": 1, "task": "sum", "correct": True, "mentioned": True, "truncated": False}]
    pool[0] |= {"completion": "1 + 1 = 2\n#### 2", "lenient": True, "surplus": 0, "up_to_surplus": True}
    elsewhere = [{"id": f"q/{i}", "task": "anatomy", "correct": i == 0, "truncated": False} for i in range(4)]
    costs = {"active": 1.0, "elements": 8, "train_seconds": 2.0, "peak_bytes": 3, "score_seconds": 1.0}
    outcome = {"items": pool, "pass": {}, "benchmarks": {"mmlu": elsewhere}, "history": []} | costs
    spec = settings.experiments["lora_sft"]
    made = experiment_record(settings, spec, "lora_sft-seed0", {"stage1": outcome}, origin(), [], {})
    assert made.name == "lora_sft-seed0"
    assert made.metric("stage1/accuracy").value == 1.0 and made.metric("stage1/mmlu/accuracy").value == 0.25
    assert made.metric("stage1/peak_bytes").value == 3
    assert mean_outcomes([made], "stage1") == {"a": 1.0}
    assert mean_outcomes([made], "stage1/mmlu") == {"q/0": 1.0, "q/1": 0.0, "q/2": 0.0, "q/3": 0.0}


@pytest.mark.parametrize(
    ("completion", "surplus", "up_to_surplus"),
    [
        ("7 + 8 = 15\n#### 15", 0, True),
        ("7 + 8 = 15\n15 - 8 = 7\n#### 7", 1, True),
        ("#### 15", -1, False),
        ("7 + 8 = 14\n#### 14", 0, False),
        ("", -1, False),
    ],
)
def test_lines_of_a_completion_are_compared_with_the_solutions(completion, surplus, up_to_surplus):
    compared = accuracy.compared_lines(completion, "7 + 8 = 15\n#### 15")
    assert compared == {"surplus": surplus, "up_to_surplus": up_to_surplus}


@pytest.mark.parametrize(("completion", "right"), [("#### Paris", True), ("", False), ("#### Rome", False)])
def test_of_a_solution_without_lines_the_answer_alone_is_compared(completion, right):
    assert accuracy.compared_lines(completion, "#### Paris") == {"surplus": 0, "up_to_surplus": right}


def test_word_problems_that_no_pool_has_are_answered_and_have_a_loss(saved_model):
    chosen = load_profile(
        "smoke",
        model={"source": str(saved_model), "dtype": "float32"},
        evaluation={"gsm_symbolic": {"items": 3, "max_new_tokens": 5}},
    )
    record = evaluation.evaluate(*models.load_base(chosen), "gsm_symbolic", chosen)
    assert {"accuracy", "truncated", "lenient", "loss"} <= record.metrics.keys() and record.metric("loss").n == 3
    assert [item["id"] for item in record.items] == [f"gsm-symbolic-{i}" for i in range(3)]
    rows, prompts = data.gsm_symbolic(3), {row["prompt"] for row in data.load_pool(chosen)}
    # reasoning-gym's own answers end the solutions, in the layout that the pool teaches, and no question is the pool's.
    assert all(accuracy.is_correct(row["solution"], row["answer"], marked=True) for row in rows)
    assert not any(row["prompt"] in prompts or "final answer" in row["prompt"] for row in rows)
