"""Folders that are made once: each holds what it was made from, and is made again only if that changed.

A phase's folder under `runs/<profile>/` holds what it made and a `manifest.json` of what it was made from (settings,
upstream fingerprints, code). Asked again, a phase whose manifest still matches is read back; otherwise it says what
changed and is made again. Folders are completed under a temporary name and then renamed.
"""

import ast
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorapar_utils.errors import InputError
from lorapar_utils.records import write_atomically
from lorapar_utils.settings import Settings


def inputs_of(settings: Settings, modules: tuple[str, ...], **more) -> dict:
    code = {module: _code_hash(module) for module in modules}
    return json.loads(json.dumps({"model": settings.model.model_dump(), "code": code, **more}, default=str))


def _code_hash(module: str) -> str:
    """Of the syntax tree: comments and layout may change without making anything again."""
    source = (Path(__file__).parent / f"{module}.py").read_text()
    return hashlib.sha256(ast.dump(ast.parse(source)).encode()).hexdigest()[:16]


def made_from(folder: Path) -> dict | None:
    """What a finished folder was made from, nothing known if its manifest is damaged; None for one not finished."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return None
    try:
        return json.loads(manifest.read_text())
    except json.JSONDecodeError:
        return {}


def is_current(folder: Path, inputs: dict) -> bool:
    before = made_from(folder)
    if before is None:
        return False
    changed = [key for key in sorted({*before, *inputs}) if before.get(key) != inputs.get(key)]
    if changed:
        print(f"{_shown(folder)}: made again, because {', '.join(changed)} changed")
    return not changed


@contextmanager
def completed(folder: Path, inputs: dict) -> Iterator[Path]:
    """A scratch folder that becomes `folder`, manifest included, when the block ends well."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"runs: {folder.parent} cannot be written ({error}); free space or change its rights"
        ) from None
    try:
        yield scratch
        write_atomically(scratch / "manifest.json", json.dumps(inputs, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
        print(f"wrote {_shown(folder)}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _shown(path: Path) -> str:
    return os.path.relpath(path)
