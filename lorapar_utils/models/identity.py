"""What a model is, by the content of its files."""

import json
import re
from pathlib import Path

from lorapar_utils.cache import file_hash
from lorapar_utils.settings import Settings

# Suffixes of the files that define a model and its tokenizer.
MODEL_FILES = (".safetensors", ".bin", ".gguf", ".json", ".model", ".jinja", ".txt")
# Other files in a model's folder with these suffixes, which are not loaded with the model.
NO_MODEL_FILE = re.compile(
    r"(trainer_state|(all|train|eval|test|predict)_results)\.json|(training_args|optimizer|scheduler)\.bin"
    r"|(readme|licen[cs]e|notice|requirements)\b.*\.txt",
    re.IGNORECASE,
)


def model_identity(settings: Settings) -> dict:
    """The section `model`, with the hashes of the files in place of a local folder's name.

    Other weights change the result. Moving the folder, or writing the same content again, does not.
    """
    section = settings.model.model_dump() | {"system_prompt": settings.system_prompt}
    folder = Path(settings.model.source).expanduser()
    if folder.is_dir():
        section["source"] = _hashes(folder)
        if base := base_of_adapter(folder):
            section["base"] = _hashes(base)
    elif folder.is_file():
        section["source"] = {folder.name: file_hash(folder)}
    return section


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_hash(path) for path in sorted(folder.iterdir()) if _is_of_a_model(path)}


def base_of_adapter(folder: Path) -> Path | None:
    """The folder that an adapter in `folder` names as its base; None if it names a hub id, or is no adapter."""
    try:
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        return folder / named if (folder / named).is_dir() else None
    except (OSError, ValueError, LookupError, TypeError):
        return None  # whoever loads the model says what is wrong with it


def _is_of_a_model(path: Path) -> bool:
    return (
        path.suffix in MODEL_FILES
        and not path.name.startswith(".")
        and not NO_MODEL_FILE.fullmatch(path.name)
        and path.is_file()
    )
