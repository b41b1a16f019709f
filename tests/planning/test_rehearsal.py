"""Every profile for a model from elsewhere, rehearsed on folders in the hub's layout: both stages, the benchmarks, the book's pages."""

import json
import os
import shutil
import sys

import hub_like
import jupytext
import pytest
from conftest import ROOT
from transformers import AutoConfig

from lorapar_utils.errors import InputError
from lorapar_utils.planning import preflight, rehearsal
from lorapar_utils.settings import load_profile

# profile -> (architecture, the tokenizer's family, pool); pages are filled in for one checked and one free-text pool
PROFILES = {
    "llama2-7b": ("Llama-2-7b-hf", "llama-2", "gsm8k"),
    "llama2-7b-chat": ("Llama-2-7b-chat-hf", "llama-2-chat", "gsm8k"),
    "llama2-7b-dolly": ("Llama-2-7b-hf", "llama-2", "dolly-15k"),
    "llama2-7b-platypus": ("Llama-2-7b-hf", "llama-2", "open-platypus"),
    "llama2-7b-codealpaca": ("Llama-2-7b-hf", "llama-2", "codealpaca-20k"),
    "qwen2.5-7b": ("Qwen2.5-7B", "qwen-2.5", "gsm8k"),
    "gemma3-270m": ("gemma-3-270m-it", "gemma-2", None),  # its pool is made, not read
    "study-gsm8k": ("SmolLM2-135M-Instruct", "qwen-2.5", "gsm8k"),
}
WITH_PAGES = ("llama2-7b-chat", "llama2-7b-dolly")
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """What of the clone a rehearsal reads, as the working directory."""
    for name in ("profiles", "book", "notebooks", "results"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("_build"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mine(clone, profile, data=None, **more):
    """A user's profile over `profile`, with the model's and the data's folders named."""
    architecture, family, source = PROFILES[profile]
    hub_like.make_model_folder(clone / "hub" / architecture, architecture, family)
    if source and data is None:
        data = hub_like.make_data_folder(clone / "data" / source, source)
    if not (clone / "data" / "mmlu").is_dir():
        hub_like.make_mmlu_folder(clone / "data" / "mmlu")
    content = {
        "extends": profile,
        "model": {"source": f"hub/{architecture}"},
        "pool": {"path": data and str(data)},
        "evaluation": {"mmlu": {"path": "data/mmlu"}},
    }
    path = clone / "profiles" / "mine.yaml"
    path.write_text(json.dumps(content | more))  # JSON is YAML
    return path


@pytest.mark.parametrize("profile", PROFILES)
def test_every_phase_of_a_profile_runs_in_small(clone, profile, capsys):
    path = mine(clone, profile)
    taken = rehearsal.rehearse(str(path), pages=profile in WITH_PAGES)
    kinds = {spec.stages for spec in load_profile(profile).experiments.values()}
    for stages in kinds:
        assert any(", then ".join(stages) in what for what, _ in taken)
    assert not list((clone / "runs").glob("*rehearsal*")), "something of it was kept"
    assert ("pool: " in capsys.readouterr().out) == (PROFILES[profile][2] is not None)  # what was read is counted


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not beside the project")
def test_the_papers_profile_on_the_real_gsm8k(clone, capsys):
    rehearsal.rehearse(str(mine(clone, "llama2-7b", GSM8K)), pages=False)
    assert "train 70" in capsys.readouterr().out


def test_what_a_run_would_stop_at_is_named(clone, capsys):
    path = mine(clone, "llama2-7b", adapter={"modules": "GUD"}, grpo={"reward": "answer"})
    (clone / "data/gsm8k/main/train-00000-of-00001.parquet").unlink()
    assert rehearsal.main([str(path)]) == 2
    assert "pool.path" in capsys.readouterr().err
    free = mine(clone, "llama2-7b-dolly", grpo={"reward": "answer"})
    with pytest.raises(InputError, match="grpo.reward = 'answer': .* has several lines"):
        rehearsal.rehearse(str(free))
    lines = mine(clone, "llama2-7b-platypus", adapter={"modules": ["qkv_proj"]})
    with pytest.raises(InputError, match=r"adapter.modules = \('qkv_proj',\): LlamaForCausalLM has no qkv_proj"):
        rehearsal.rehearse(str(lines))


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "profiles" / "architectures").glob("*.json")))
def test_a_toy_is_narrow_and_keeps_its_vocabulary(name):
    wide = json.loads((ROOT / "profiles" / "architectures" / f"{name}.json").read_text())
    config = rehearsal.toy_config(AutoConfig.for_model(**wide))
    assert config.hidden_size == rehearsal.WIDTH and config.num_hidden_layers == rehearsal.LAYERS
    assert config.vocab_size == wide["vocab_size"]
    shared = wide["num_key_value_heads"] < wide["num_attention_heads"]
    assert (config.num_key_value_heads < config.num_attention_heads) == shared


def test_a_key_that_is_missing_stops_a_rehearsal_and_no_server_is_asked(clone, monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    teacher = {"name": "r1", "kind": "api", "role_play": True, "model": "m", "base_url": "http://127.0.0.1:9/v1"}
    voting = {"teachers": [teacher | {"api_key_env": "SOME_KEY"}]}
    path = mine(clone, "llama2-7b", voting=voting)
    with pytest.raises(InputError, match="SOME_KEY is not set"):
        rehearsal.rehearse(str(path), pages=False)
    monkeypatch.setitem(os.environ, "SOME_KEY", "word")
    rehearsal.rehearse(str(path), pages=False)  # nobody listens at that address


def test_questions_of_the_benchmark_in_the_training_split_are_named(clone):
    held = {"benchmarks": ["gsm8k"], "gsm8k": {"path": "data/gsm8k", "shots": 1}}
    path = mine(clone, "llama2-7b", evaluation=held)
    # The pool's own file of test questions is the benchmark's, and is taken for training.
    settings = load_profile(path).changed(
        pool={"path": str(clone / "data/gsm8k/main/test-00000-of-00001.parquet")},
        voting={
            "teachers": [
                {"kind": "local", "name": "t", "role_play": False, "persona": "", "question": "?", "labels": ("a", "b")}
            ]
        },
    )
    with pytest.raises(InputError, match="of its test questions are in the pool's training split"):
        preflight.check_data(settings)


def test_a_rehearsal_leaves_the_main_module_as_it_was(clone):
    main = sys.modules["__main__"]
    (clone / "notebooks" / "page.py").write_text('# %% tags=["parameters"]\nprofile = 1\n')
    jupytext.write(jupytext.read(clone / "notebooks" / "page.py"), clone / "notebooks" / "page.ipynb")
    rehearsal._run_page("page", clone / "profiles" / "smoke.yaml")
    assert sys.modules["__main__"] is main


def test_an_architecture_that_has_no_toy_is_named(clone):
    """A recurrence whose sizes hang on its width."""
    path = mine(clone, "llama2-7b")
    config = clone / "hub" / "Llama-2-7b-hf" / "config.json"
    config.write_text(json.dumps({"model_type": "mamba2", "vocab_size": json.loads(config.read_text())["vocab_size"]}))
    with pytest.raises(InputError, match="rehearse: no toy can be made of mamba2"):
        rehearsal.rehearse(str(path))


def test_a_model_that_also_reads_images_is_narrow_in_every_part():
    config = AutoConfig.for_model("gemma3", text_config={"hidden_size": 2560, "num_hidden_layers": 34})
    small = rehearsal.toy_config(config)
    assert (small.text_config.hidden_size, small.text_config.vocab_size) == (64, config.text_config.vocab_size)
    assert small.text_config.num_hidden_layers == len(set(config.text_config.layer_types)) == 2
    assert small.vision_config.hidden_size == 64


def test_what_is_missing_on_this_machine_is_said_before_a_run(clone, monkeypatch):
    settings = load_profile(mine(clone, "llama2-7b", model={"source": "hub/Llama-2-7b-hf", "quantization": "nf4"}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="bitsandbytes is not installed"):
        preflight.check(settings)
    with pytest.raises(InputError, match="vllm is not installed"):
        preflight.check(settings.changed(model={"quantization": None}, grpo={"rollouts": "vllm-colocate"}))
    monkeypatch.undo()
    judge = {"kind": "local", "name": "t", "role_play": False, "persona": "", "question": "?", "labels": ("a", "b")}
    with pytest.raises(InputError, match="/no/such/judge does not exist"):
        preflight.check_data(settings.changed(voting={"teachers": [judge | {"source": "/no/such/judge"}]}))
    with pytest.raises(InputError, match="voting.teachers: the list is empty"):
        preflight.check_data(settings.changed(voting={"teachers": []}))
