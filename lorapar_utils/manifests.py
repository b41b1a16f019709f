"""Folders that are made once: each holds what it was made from, and is made again only if that changed.

A phase's folder under `runs/<profile>/` holds what it made and a `manifest.json` of what it was made from (settings,
upstream fingerprints, code). Asked again, a phase whose manifest still matches is read back; otherwise it says what
changed and is made again. Folders are completed under a temporary name and then renamed.
"""

import ast
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorapar_utils.errors import InputError
from lorapar_utils.records import write_atomically
from lorapar_utils.settings import Settings, project_root

# Under which a manifest keeps the sizes of its folder's files: one that was cut off or taken away is noticed.
SIZES = "sizes of files"
# Modules that say what is to be done, and keep and name what was made; no number is other for them.
WITHOUT_RESULT = {"settings", "errors", "records", "manifests", "machine", "processes", "phases", "splits", "sandboxed"}
# Files of a model's folder that decide what it computes and how it reads.
MODEL_FILES = (".safetensors", ".bin", ".gguf", ".json", ".model", ".jinja", ".txt")


def inputs_of(settings: Settings, modules: tuple[str, ...], **more) -> dict:
    """What a phase is made from: the model by content, the code of these modules and all that they import, the rest."""
    code = {module: _code_hash(module) for module in sorted(with_imports(*modules))}
    return json.loads(json.dumps({"model": model_identity(settings), "code": code, **more}, default=str))


def model_identity(settings: Settings) -> dict:
    """The section `model`, with the hashes of its files in place of a local folder's name: other weights are noticed.

    A folder may be moved or written anew with the same content, and nothing is made again.
    """
    section = settings.model.model_dump() | {"system_prompt": settings.system_prompt}
    folder = Path(settings.model.source).expanduser()
    if folder.is_dir():
        files = [
            path for path in sorted(folder.iterdir()) if path.suffix in MODEL_FILES and not path.name.startswith(".")
        ]
        section["source"] = {path.name: file_hash(path) for path in files}
    elif folder.is_file():
        section["source"] = {folder.name: file_hash(folder)}
    return section


def folder_hashes(place: str | None) -> dict[str, str] | None:
    """The hash of each file at `place`, a folder or a file; None where the hub has them."""
    if place is None:
        return None
    root = Path(place).expanduser()
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    return {path.name if path == root else str(path.relative_to(root)): file_hash(path) for path in files}


def file_hash(path: Path) -> str:
    """SHA-256 of a file; read again only if its size or time of change is another than when it was last hashed."""
    stat = path.stat()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    kept = project_root() / "runs" / "file_hashes" / hashlib.sha256(key.encode()).hexdigest()[:32]
    # A file of a second ago can be written again without another time.
    settled = time.time_ns() - stat.st_mtime_ns > 2e9
    if settled and kept.is_file():
        return kept.read_text()
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if settled and stat.st_size > 1 << 20:
        write_atomically(kept, digest)
    return digest


def with_imports(*modules: str) -> set[str]:
    """These modules of the package and all that they import of it, however far, but for `WITHOUT_RESULT`."""
    reached, waiting = set(), set(modules)
    while waiting:
        module = waiting.pop()
        reached.add(module)
        imported = set()
        for node in ast.walk(_syntax_tree(module)):
            if isinstance(node, ast.ImportFrom) and node.module == __package__:
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{__package__}."):
                imported.add(node.module.removeprefix(f"{__package__}."))
        if module == "sandbox":  # read as text, not imported
            imported |= {f"sandboxed/{path.stem}" for path in (Path(__file__).parent / "sandboxed").glob("*.py")}
        waiting |= imported - reached - WITHOUT_RESULT
    return reached


@functools.cache
def _syntax_tree(module: str) -> ast.Module:
    return ast.parse((Path(__file__).parent / f"{module}.py").read_text())


@functools.cache
def _code_hash(module: str) -> str:
    """Of the syntax tree: comments and layout may change without making anything again."""
    return hashlib.sha256(ast.dump(_syntax_tree(module)).encode()).hexdigest()[:16]


def made_from(folder: Path) -> dict | None:
    """What a finished folder was made from, {} if it or its manifest is damaged; None for one not finished."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return None
    try:
        content = json.loads(manifest.read_text())
        sizes = content.pop(SIZES, {})
        whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (ValueError, AttributeError, OSError):
        return {}
    return content if whole else {}


def is_current(folder: Path, inputs: dict) -> bool:
    before = made_from(folder)
    if before is None:
        return False
    if not before:
        print(f"{_shown(folder)}: made again, because it is damaged")
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
        files = (path for path in sorted(scratch.rglob("*")) if path.is_file())
        sizes = {str(path.relative_to(scratch)): path.stat().st_size for path in files}
        write_atomically(scratch / "manifest.json", json.dumps(inputs | {SIZES: sizes}, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
        print(f"wrote {_shown(folder)}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _shown(path: Path) -> str:
    return os.path.relpath(path)
