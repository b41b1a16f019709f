"""Manifests: a phase runs again only if its inputs changed.

A phase's folder under `runs/<profile>/` holds the phase's files and a `manifest.json` of its inputs (settings, hashes
of earlier phases, code). If the manifest matches the inputs, the phase reads its files back. Otherwise it prints which
inputs changed and runs again. A folder is written under a temporary name and then renamed.
"""

import ast
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorapar_utils.data_files import data_files
from lorapar_utils.errors import InputError
from lorapar_utils.records import write_atomically
from lorapar_utils.settings import Settings, project_root

# Keys of a manifest: sizes of the folder's files, and hashes of files up to `HASHED_BYTES`. They reveal a file that was
# cut off, removed or changed. Older manifests have sizes only.
SIZES, HASHES = "sizes of files", "hashes of files"
HASHED_BYTES = 64 << 20
HASH = re.compile(r"[0-9a-f]{64}")
# Modules whose code changes no number: they schedule phases, or keep and name the results.
WITHOUT_RESULT = {"settings", "errors", "records", "manifests", "machine", "processes", "phases", "splits", "sandboxed"}
# Suffixes of the files that define a model and its tokenizer.
MODEL_FILES = (".safetensors", ".bin", ".gguf", ".json", ".model", ".jinja", ".txt")
# Other files in a model's folder with these suffixes, which are not loaded with the model.
NO_MODEL_FILE = re.compile(
    r"(trainer_state|(all|train|eval|test|predict)_results)\.json|(training_args|optimizer|scheduler)\.bin"
    r"|(readme|licen[cs]e|notice|requirements)\b.*\.txt",
    re.IGNORECASE,
)


def inputs_of(settings: Settings, modules: tuple[str, ...], **more) -> dict:
    """The inputs of a phase: hashes of the model and of the code of `modules` with their imports, and `more`."""
    code = {module: _code_hash(module) for module in sorted(with_imports(*modules))}
    model = model_identity(settings)
    if "teachers" not in code:
        del model["target_name"]  # only the teachers' prompts contain the name
    return json.loads(json.dumps({"model": model, "code": code, **more}, default=str))


def model_identity(settings: Settings) -> dict:
    """The section `model`, with the hashes of the files in place of a local folder's name.

    Other weights change the result. Moving the folder, or writing the same content again, does not.
    """
    section = settings.model.model_dump() | {"system_prompt": settings.system_prompt}
    folder = Path(settings.model.source).expanduser()
    if folder.is_dir():
        section["source"] = {path.name: file_hash(path) for path in sorted(folder.iterdir()) if _is_of_a_model(path)}
    elif folder.is_file():
        section["source"] = {folder.name: file_hash(folder)}
    return section


def _is_of_a_model(path: Path) -> bool:
    return (
        path.suffix in MODEL_FILES
        and not path.name.startswith(".")
        and not NO_MODEL_FILE.fullmatch(path.name)
        and path.is_file()
    )


def folder_hashes(place: str | None) -> dict[str, str] | None:
    """The hash of each data file at `place`, a folder or a file; None if `place` is None, for the hub.

    Files that `data_files` does not list are left out. So are unreadable files, because reading them later raises.
    """
    if place is None:
        return None
    root = Path(place).expanduser()
    if root.is_file():
        return {root.name: file_hash(root)}
    return {str(path.relative_to(root)): file_hash(path) for path in data_files(root, lambda error: None)}


def file_hash(path: Path) -> str:
    """SHA-256 of a file; the file is read again only if inode, size, mtime or ctime changed.

    ctime is needed because `cp -p`, `rsync -t` and `tar` set mtime back.
    """
    stat = path.stat()
    key = f"{path.resolve()} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    cache = project_root() / "runs" / "file_hashes" / hashlib.sha256(key.encode()).hexdigest()[:32]
    # A file changed within two seconds may change again without a change of its times.
    settled = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > 2e9
    if settled:
        # If the cached hash is cut off or unreadable, the hash is computed again.
        with suppress(OSError, UnicodeDecodeError):
            digest = cache.read_text(encoding="utf-8")
            if HASH.fullmatch(digest):
                return digest
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if settled and stat.st_size > 1 << 20:
        # If the hash cannot be cached, it is computed again the next time.
        with suppress(OSError):
            write_atomically(cache, digest)
    return digest


def with_imports(*modules: str) -> set[str]:
    """`modules` and the package's modules that they import, directly or indirectly, except `WITHOUT_RESULT`."""
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
    return ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))


@functools.cache
def _code_hash(module: str) -> str:
    """Hash of a module's syntax tree, which comments and layout do not change."""
    return hashlib.sha256(ast.dump(_syntax_tree(module)).encode()).hexdigest()[:16]


def made_from(folder: Path) -> dict | None:
    """The inputs in the folder's manifest: `{}` if folder or manifest is damaged, `None` if there is no manifest."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return None
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        sizes, hashes = content.pop(SIZES, {}), content.pop(HASHES, {})
        intact = all((folder / name).stat().st_size == size for name, size in sizes.items())
        intact = intact and all(file_hash(folder / name) == digest for name, digest in hashes.items())
    except (ValueError, AttributeError, TypeError, OSError):
        return {}
    return content if intact else {}


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
    """A scratch folder that becomes `folder`, with a manifest of `inputs`, if the block ends without an error."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"runs: {folder.parent} cannot be written ({error}); free space or change its rights"
        ) from None
    try:
        yield scratch
        # A copied folder contains the manifest of the original.
        (scratch / "manifest.json").unlink(missing_ok=True)
        files = {str(path.relative_to(scratch)): path for path in sorted(scratch.rglob("*")) if path.is_file()}
        sizes = {name: path.stat().st_size for name, path in files.items()}
        hashes = {name: file_hash(files[name]) for name, size in sizes.items() if size <= HASHED_BYTES}
        write_atomically(scratch / "manifest.json", json.dumps(inputs | {SIZES: sizes, HASHES: hashes}, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
        print(f"wrote {_shown(folder)}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _shown(path: Path) -> str:
    return os.path.relpath(path)
