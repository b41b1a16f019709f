"""A model's folder as people have them: read right, or refused in one line, by `make plan` as by a run."""

import json
import shutil
from pathlib import Path

import hub_like
import pytest
import torch
from conftest import make_tiny_base, make_tiny_tokenizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from lorapar_utils import build, importance, models
from lorapar_utils.errors import InputError
from lorapar_utils.models import base, files
from lorapar_utils.models.identity import model_identity
from lorapar_utils.planning import plan, preflight
from lorapar_utils.settings import load_profile


def local(folder, **more):
    return load_profile("smoke", model={"source": str(folder), "dtype": "float32", **more})


@pytest.fixture
def folder(tmp_path):
    """A whole model in the hub's layout."""
    make_tiny_base().save_pretrained(tmp_path / "model")
    make_tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def without(name):
    return lambda folder: (folder / name).unlink()


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def changed(name, **values):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def one_layer_missing(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1" not in k}, folder / "model.safetensors", {"format": "pt"})


def one_shard_missing(folder):
    index = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def without_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


def two_ggufs(folder):
    (folder / "model.safetensors").unlink()
    for name in ("a.Q4.gguf", "b.Q8.gguf"):
        (folder / name).write_bytes(b"GGUF")


def under_another_name(folder):
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


def as_pickles_with_one_missing(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK")
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))


def wrapped_names(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({f"module.{k}": v for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def an_index(content):
    def spoil(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_bytes(content)

    return spoil


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 13476\n"
# what was done to the folder -> (how, what the message says)
DAMAGES = {
    "weights missing": (without("model.safetensors"), "holds no weights"),
    "weights cut off": (cut_off, r"model.safetensors is damaged or was cut off .*fetch it again"),
    "weights a Git LFS pointer": (written("model.safetensors", POINTER), r"is a Git LFS pointer.*git lfs pull"),
    "weights empty": (written("model.safetensors", b""), "model.safetensors is empty; fetch it again"),
    "a shard missing": (one_shard_missing, "lacks model-00002-of-00002.safetensors"),
    "configuration missing": (without("config.json"), "has weights and no config.json"),
    "configuration no JSON": (written("config.json", b"<html>"), "config.json is no JSON"),
    "tokenizer missing": (without_tokenizer, "has no tokenizer"),
    "tokenizer damaged": (written("tokenizer.json", b"{"), "its tokenizer could not be loaded"),
    "architecture unknown": (
        changed("config.json", model_type="quantum_llama"),
        "could not be loaded: .*quantum_llama",
    ),
    "no causal model": (changed("config.json", model_type="t5", architectures=["T5ForConditionalGeneration"]), "t5"),
    "quantized already": (changed("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), r"\(gptq\)"),
    "quantized, said in a word": (changed("config.json", quantization_config="gptq"), r"quantized already \(gptq\)"),
    "configuration a list": (written("config.json", b"[1]"), "config.json holds a list, not an object"),
    "generation configuration no JSON": (written("generation_config.json", b"{"), "generation_config.json is no JSON"),
    "generation configuration empty": (written("generation_config.json", b""), "generation_config.json is empty"),
    "generation configuration a pointer": (written("generation_config.json", POINTER), "is a Git LFS pointer"),
    "index no JSON": (an_index(b"<html>"), "index.json is no JSON"),
    "index without names": (an_index(b'{"metadata": {}}'), "index.json has no weight_map"),
    "a pickled shard missing": (as_pickles_with_one_missing, "lacks pytorch_model-00002-of-00002.bin"),
    "weights in another layout": (under_another_name, "has consolidated.safetensors, but neither model.safetensors"),
    "a classifier": (changed("config.json", architectures=["LlamaForSequenceClassification"]), "no next token"),
    "several GGUF files": (two_ggufs, r"model.gguf_file = None: .* has a.Q4.gguf, b.Q8.gguf; name one"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named_by_the_plan_and_by_the_loader(folder, damage):
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(InputError, match=message) as by_loader:
        models.load_base(local(folder))
    with pytest.raises(InputError, match=message):
        plan.configuration(local(folder))
    assert "model." in str(by_loader.value) and "\n" not in str(by_loader.value)


def test_weights_that_the_files_lack_are_not_drawn_at_random(folder):
    one_layer_missing(folder)
    with pytest.raises(InputError, match="9 of the model's weights are not in its files, first model.layers.1"):
        models.load_base(local(folder))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            changed("config.json", intermediate_size=48),
            r"model.layers.0.mlp.down_proj.weight in .* has shape .*, by config.json it",
        ),
        (changed("config.json", vocab_size=12), r"weight in .* has shape \[11, 16\], by config.json it has \[12, 16\]"),
        (changed("config.json", num_hidden_layers=1), "its files have 2 layers, its config.json 1"),
        (wrapped_names, "no weight in .* has a name of LlamaForCausalLM, as its first, module.lm_head"),
    ],
)
def test_weights_that_are_not_the_configurations_are_named_by_plan_and_loader(folder, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message):
        preflight.check_model(local(folder))
    with pytest.raises(InputError, match="model.source"):
        models.load_base(local(folder))


def test_other_towers_may_have_more_layers_and_experts_may_lie_transposed(folder):
    base = make_tiny_base()  # two layers
    names = ["visual.blocks.31.norm.weight", "model.layers.1.mlp.up_proj.weight"]
    files.check_layers(local(folder), base, names)
    with pytest.raises(InputError, match="its files have 4 layers, its config.json 2"):
        files.check_layers(local(folder), base, [*names, "layers.3.mlp.up_proj.weight"])
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].T.contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    files.check_fit(local(folder), base)


def test_a_pickle_that_would_run_something_is_refused_and_does_not_run(folder):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (folder / "was-run",)

    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="its weights could not be loaded"):
        models.load_base(local(folder))
    assert not (folder / "was-run").exists()


def test_weights_that_are_not_finite_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="the logits of LlamaForCausalLM are not finite in torch.float32"):
        models.load_base(local(folder))


@pytest.mark.parametrize("token", ["2", -1, 10**6])
def test_an_end_token_that_is_none_is_named(folder, token):
    changed("generation_config.json", eos_token_id=[token])(folder)
    with pytest.raises(
        InputError, match="model.source.*could not be loaded|eos_token_id = .* is no id of its tokenizer"
    ):
        models.load_base(local(folder))


def test_control_tokens_without_an_embedding_do_no_harm_unless_a_prompt_writes_them(folder):
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    models.load_base(local(folder))
    tokenizer.chat_template = "<image>" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="its tokenizer has tokens up to id 11, its embedding only 11 rows"):
        models.load_base(local(folder))


def test_an_end_token_added_as_an_ordinary_one_is_not_part_of_an_answer(folder):
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.add_tokens(["<|im_end|>"])
    tokenizer.save_pretrained(folder)
    model = make_tiny_base()
    model.resize_token_embeddings(12)
    model.save_pretrained(folder)
    model, read = models.load_base(local(folder))
    assert 11 in model.generation_config.eos_token_id
    assert "<|im_end|>" not in read.decode([read.convert_tokens_to_ids("1"), 11], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("note", "message"),
    [
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM").to_dict(), "of kind PROMPT_TUNING, which"),
        ({"peft_type": "LORA", "alora_invocation_tokens": [3]}, "is an activated LoRA, which works only after its"),
        ([], "holds a list, not an object"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_by_plan_and_loader(folder, note, message):
    place = folder.parent / "adapter"
    adapter_over(folder, place)
    (place / "adapter_config.json").write_text(json.dumps(note, default=str))
    for check in (models.load_base, preflight.check_model):
        with pytest.raises(InputError, match=message):
            check(local(place))


def test_a_file_without_rights_is_named(folder, monkeypatch):
    """By a stand-in for `open`, because root reads every file."""
    plain_open = Path.open

    def refusing(path, *arguments, **options):
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied")
        return plain_open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(InputError, match="model.safetensors cannot be read .*change its rights"):
        models.load_base(local(folder))


@pytest.mark.parametrize(("path", "message"), [("nowhere", "does not exist"), ("config.json", "is a file")])
def test_a_path_that_is_no_folder_is_named(folder, path, message):
    with pytest.raises(InputError, match=f"model.source: .*{path} {message}"):
        models.load_base(local(folder / path))


def test_a_home_folder_is_understood(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert models.load_base(local("~/model"))[0].config.vocab_size == 11


def test_hidden_files_and_training_leftovers_are_no_weights(folder):
    (folder / "._model.safetensors").write_bytes(b"")
    (folder / "training_args.bin").write_bytes(b"")
    models.load_base(local(folder))


def adapter_over(base, folder):
    """An adapter with weights of its own, saved as PEFT saves it, and the model with it merged in."""
    wrapped = get_peft_model(make_tiny_base(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload()


@pytest.mark.parametrize("where", ["in full", "beside it"])
def test_an_adapters_folder_is_added_to_its_base(folder, where, capsys):
    place = folder.parent / "adapter"
    merged = adapter_over(folder if where == "in full" else "../model", place)
    model, _ = models.load_base(local(place))
    assert "is an adapter; it is added to the weights" in capsys.readouterr().out
    ids = torch.tensor([[2, 3, 4]])
    torch.testing.assert_close(model(ids).logits, merged(ids).logits)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert models.load_config(local(place)).vocab_size == 11


def test_an_adapters_folder_is_another_model_once_its_base_is(folder):
    place = folder.parent / "adapter"
    adapter_over("../model", place)

    before = model_identity(local(place)), files.weights_hash(local(place))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"else")
    after = model_identity(local(place)), files.weights_hash(local(place))
    assert before[0] != after[0] and before[1] != after[1]


def test_an_adapter_whose_base_is_not_there_or_not_told_is_refused(folder):
    place = folder.parent / "adapter"
    adapter_over("/no/such/folder", place)
    with pytest.raises(InputError, match="model.source: /no/such/folder does not exist"):
        models.load_base(local(place))
    changed("adapter_config.json", base_model_name_or_path=None)(place)
    with pytest.raises(InputError, match="is an adapter over '', which is no base"):
        models.load_base(local(place))
    shutil.copy(folder / "config.json", place)
    shutil.copy(folder / "model.safetensors", place)
    with pytest.raises(InputError, match="holds a model and an adapter; give each a folder of its own"):
        models.load_base(local(place))


def test_a_gguf_file_is_found_named_or_refused(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    only = folder / "model.Q4.gguf"
    only.write_bytes(b"GGUF")
    assert files.source_of(local(folder)) == (str(folder), {"gguf_file": only.name})
    assert files.source_of(local(only)) == (str(folder), {"gguf_file": only.name})
    with pytest.raises(InputError, match=r"model.gguf_file = 'other.gguf': .* has model.Q4.gguf; name one of them"):
        files.source_of(local(folder, gguf_file="other.gguf"))
    only.write_bytes(b"<html>")
    with pytest.raises(InputError, match="is no GGUF file; fetch it again"):
        files.source_of(local(folder))


def test_a_tokenizer_larger_than_the_embedding_or_without_end_is_refused(folder):
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens(["one", "two"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="its tokenizer has tokens up to id 12, its embedding only 11 rows"):
        models.load_base(local(folder))
    endless = make_tiny_tokenizer()
    endless.eos_token = None
    endless.save_pretrained(folder)
    assert models.load_base(local(folder))[1].eos_token == "<end>"  # as the generation config says
    (folder / "generation_config.json").write_text("{}")
    changed("config.json", eos_token_id=None)(folder)
    with pytest.raises(InputError, match="names an end token, so no answer would end; set eos_token"):
        models.load_base(local(folder))


def test_the_plan_and_the_build_refuse_a_folder_before_anything_runs(folder, project, capsys):
    (folder / "model.safetensors").unlink()
    (project / "profiles/mine.yaml").write_text(f"extends: smoke\nmodel: {{source: {folder}}}\n")
    for arguments in (["mine", "--dry-run"], ["mine"]):
        assert build.main(arguments) == 2
        assert "holds no weights" in capsys.readouterr().err
    assert not list((project / "runs").glob("mine/[!p]*"))


def test_layers_that_the_model_lacks_are_named_with_those_that_it_has(folder):
    settings = local(folder)
    fused = settings.changed(adapter={"modules": ["qkv_proj", "down_proj"]})
    expected = r"LlamaForCausalLM has no qkv_proj; its linear layers are q_proj, k_proj, v_proj, o_proj, gate_proj"
    with pytest.raises(InputError, match=expected):
        models.attach_adapter(models.load_base(fused)[0], fused)
    with pytest.raises(InputError, match=expected):
        preflight.check_model(fused)
    some = settings.changed(adapter={"modules": ["o_proj", "layers.0.mlp.up_proj"]})
    adapted = models.attach_adapter(models.load_base(some)[0], some)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in importance.lora_parameters(adapted)} == {
        "o_proj",
        "up_proj",
    }


def test_a_family_tokenizer_that_ends_every_text_is_mended(tmp_path, capsys):
    tokenizer = hub_like.make_tokenizer("ends-every-text")
    assert tokenizer("1").input_ids[-1] == tokenizer.eos_token_id
    base._leave_texts_open(tokenizer)
    assert tokenizer("1").input_ids == [tokenizer.bos_token_id, *tokenizer("1", add_special_tokens=False).input_ids]
    assert "no longer does" in capsys.readouterr().out


def test_an_adapter_whose_weights_do_not_fit_its_base_is_refused(folder):
    place = folder.parent / "adapter"
    adapter_over(folder, place)
    weights = load_file(place / "adapter_model.safetensors")
    renamed = {name.replace("layers.1", "layers.9"): values for name, values in weights.items()}
    save_file(renamed, place / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="does not fit .* have no counterpart, first .*layers"):
        models.load_base(local(place))


def test_an_encoder_is_no_causal_model(folder):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(vocab_size=11, pad_token_id=0, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10.0)
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(InputError, match="BertLMHeadModel reads what comes after a token before it predicts it"):
        models.load_base(local(folder))
