"""A tiny random LLaMA with a LoRA adapter, and a profile over it: real classes, a thousandth of the size."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker on each core: threads of torch would only wait for those of the other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
# A shell that starts the tests in the background ignores Ctrl-C, and what they start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def pytest_collection_modifyitems(items):
    """The smoke book first: it takes longest, and one worker makes it while the others run the rest."""
    items.sort(key=lambda item: "test_end_to_end" not in item.nodeid)


def make_tiny_model(dtype=torch.float32):
    """Two layers of `dtype`, A and B (fp32) large enough that the second-order term shows in every matrix."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    base = LlamaForCausalLM(config).to(dtype)
    base.requires_grad_(False)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_tiny_examples():
    """Nine examples of different lengths."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for i in range(9):
        ids = torch.randint(3, 64, (5 + i,), generator=generator).tolist()
        answer = 2 + i % 3
        examples.append({"input_ids": ids, "labels": [-100] * (len(ids) - answer) + ids[-answer:]})
    return examples


@pytest.fixture
def tiny_model():
    return make_tiny_model()


@pytest.fixture
def tiny_examples():
    return make_tiny_examples()


@pytest.fixture
def saved_model(tiny_model, tmp_path):
    """A local folder in the hub's layout, chat template included."""
    vocabulary = {f"t{i}": i for i in range(62)} | {"<unk>": 62, "<eos>": 63}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    folder = tmp_path / "model"
    tiny_model.unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


KEEP = ("Makefile", "Snakefile", "environment.yml", "pyproject.toml", "requirements.lock", "README.md")


def copy_project(folder: Path) -> Path:
    """The project in a folder of its own, where `make` finds a complete .venv: the one that runs the tests."""
    for name in ("lorapar_utils", "notebooks", "profiles", "book", "results"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_build", "__pycache__"))
    for name in KEEP:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv" / "bin").mkdir(parents=True)
    for tool in ("python", "jupyter"):
        script = folder / ".venv" / "bin" / tool
        script.write_text(f'#!/bin/sh\nexec "{sys.executable.removesuffix("python") + tool}" "$@"\n')
        script.chmod(0o755)
    (folder / ".venv" / ".installed").touch()
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A temporary copy of the project's profiles and book, as the working directory."""
    for name in ("profiles", "book"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("_build"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_tiny_tokenizer():
    """Words of a question-and-answer game, few enough that a random model often ends in the wanted layout."""
    words = ["<pad>", "<end>", "####", "\n", "1", "2", "3", "+", "user", "assistant", "system"]
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokens.pre_tokenizer = Split(" ", "removed")
    tokens.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_tiny_base():
    """The tiny LLaMA over the tiny tokenizer's vocabulary, frozen."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def make_tiny_policy(dtype=torch.float32):
    """`make_tiny_base` in `dtype`, with an adapter (fp32) large enough to matter."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(make_tiny_base().to(dtype), lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def why_not() -> str:
    """Why there is no sandbox on this machine; empty where there is one."""
    from lorapar_utils.errors import InputError
    from lorapar_utils.evaluation import sandbox

    try:
        sandbox.require_sandbox()
    except InputError as error:
        return str(error)
    return ""


def generated(model, prompt, end, limit):
    """The greedy completion of one prompt by transformers."""
    ids = torch.tensor([prompt])
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=end,
        pad_token_id=0,
    )
    return found[0, len(prompt) :].tolist()
