"""Folders that are made once, each named by the fingerprint of what it was made from: if it is there, it is current.

What a folder is made from are settings, hashes of earlier phases, versions of the libraries, and code: the file that
makes the folder, with all files of ours that it imports. Folders of other settings, or of earlier code, stay.
"""

import ast
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from lorapar_utils.errors import InputError
from lorapar_utils.machine import hardware
from lorapar_utils.settings import project_root, working_root

PACKAGE = Path(__file__).resolve().parent
MANIFEST = "manifest.json"
# Of a larger file only the size is compared.
HASHED_BYTES = 64 << 20
HASH = re.compile(r"[0-9a-f]{64}")
VERSIONS_OF = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "reasoning-gym", "numpy", "pandas")


def fingerprint(content: object) -> str:
    """A short hash of anything JSON can hold: equal content, equal fingerprint."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_whole(folder: Path) -> bool:
    """Whether the folder was completed, and none of its files was removed, cut off or changed since.

    A change of a file above `HASHED_BYTES` that keeps its size is not noticed.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all(_state(folder / name) == state for name, state in files.items())
    except (ValueError, AttributeError, LookupError, TypeError, OSError):
        return False


@contextmanager
def completed(folder: Path, inputs: dict, begun: dict | None = None) -> Iterator[Path]:
    """A scratch folder that becomes `folder` if the block ends without an error.

    Its manifest holds the `inputs`, the origin, and the state of every file.

    Parameters
    ----------
    begun
        The `origin` when the making began; None for now.

    Raises
    ------
    InputError
        The folder cannot be written.
    """
    begun = begun or origin()
    scratch = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"runs: {folder.parent} cannot be written ({error}); free space or change its rights"
        ) from None
    try:
        yield scratch
        files = {str(path.relative_to(scratch)): _state(path) for path in sorted(scratch.rglob("*")) if path.is_file()}
        manifest = {"inputs": inputs, "origin": begun, "files": files}
        write_atomically(scratch / MANIFEST, json.dumps(manifest, indent=1, default=str))
        # Another process may have completed the same folder in the meantime.
        if not is_whole(folder):
            if folder.exists():
                print(f"{os.path.relpath(folder)}: made again, because it is damaged")
                shutil.rmtree(folder)
            try:
                scratch.rename(folder)
            except OSError:
                if not is_whole(folder):
                    raise
            else:
                print(f"wrote {os.path.relpath(folder)}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def origin_of(folder: Path) -> dict:
    """The `origin` in the manifest of a completed folder."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["origin"]


def origin() -> dict:
    """When, from which commit, with which versions and on which hardware something is made: now, here."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **_git_state(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in VERSIONS_OF},
        "hardware": hardware(),
    }


def libraries(*names: str) -> dict[str, str]:
    """Versions of these libraries, else of those that compute: another version may give other numbers."""
    return {name: importlib.metadata.version(name) for name in names or ("torch", "transformers", "peft", "trl")}


def code_of(file: str | Path) -> str:
    """Hash of the code that a file (usually `__file__`) runs: the file, and all files of ours that it imports.

    Comments, layout and docstrings do not count.
    """
    return fingerprint({str(path.relative_to(PACKAGE)): _code_hash(path) for path in code_files(Path(file))})


def code_files(*places: Path) -> list[Path]:
    """The files of the package that these files import, directly or indirectly, with those themselves.

    All files of a folder inside a room count, because the sandbox reads its scripts as text and imports none.
    """
    waiting = [place.resolve() for place in places]
    reached: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached.add(path)
            waiting += [file for name in _imports(path) for file in _files_of(name)]
    return sorted(path for path in reached if path.is_relative_to(PACKAGE))


def file_hash(path: Path) -> str:
    """SHA-256 of a file; the file is read again only if inode, size, mtime or ctime changed.

    ctime is needed because `cp -p`, `rsync -t` and `tar` set mtime back.
    """
    stat = path.stat()
    key = f"{path.resolve()} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    cache = working_root() / "runs" / "file_hashes" / hashlib.sha256(key.encode()).hexdigest()[:32]
    # A file changed within two seconds may change again without a change of its times.
    settled = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > 2e9
    if settled:
        # If the cached hash is cut off or unreadable, the hash is computed again.
        with suppress(OSError, UnicodeDecodeError):
            digest = cache.read_text(encoding="utf-8")
            if HASH.fullmatch(digest):
                return digest
    digest = hash_now(path)
    if settled and stat.st_size > 1 << 20:
        # If the hash cannot be cached, it is computed again the next time.
        with suppress(OSError):
            write_atomically(cache, digest)
    return digest


def hash_now(path: Path) -> str:
    """SHA-256 of a file, which is read."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _state(path: Path) -> list:
    """Size and hash of a file, the hash None for a large one."""
    size = path.stat().st_size
    return [size, file_hash(path) if size <= HASHED_BYTES else None]


@functools.cache
def _syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def _code_hash(path: Path) -> str:
    """Hash of the syntax tree without docstrings and empty fields, of which each version of Python has its own."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_text(line)]
        for field, value in list(ast.iter_fields(node)):
            if value == []:
                delattr(node, field)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _imports(path: Path) -> set[str]:
    """Dotted names of this package that a file imports: `a.b` of `from a import b`, be it a module or not."""
    names: set[str] = set()
    for node in ast.walk(_syntax_tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == PACKAGE.name}


def _files_of(name: str) -> list[Path]:
    """The files that Python runs to import a dotted name. The file of the module itself is the last."""
    files, folder = [PACKAGE / "__init__.py"], PACKAGE
    for part in name.split(".")[1:]:
        if (folder / f"{part}.py").is_file():
            return [*files, folder / f"{part}.py"]
        folder = folder / part
        if not folder.is_dir():
            break
        if folder.parent != PACKAGE:
            files += sorted(folder.glob("*.py"))
        files.append(folder / "__init__.py")
    return files


def _git_state() -> dict:
    """The commit, and whether tracked files differ from it; both None without git or outside a clone."""

    def git(*arguments: str) -> str | None:
        try:
            process = subprocess.run(["git", *arguments], cwd=project_root(), capture_output=True, text=True)
        except OSError:
            return None
        return process.stdout.strip() if process.returncode == 0 else None

    # An unpacked archive may lie inside the repository of another project.
    if not git("ls-files", "profiles/defaults.yaml"):
        return {"commit": None, "dirty": None}
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}
