"""The rooms of the package: arrows go down only, and each says what it is for."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

from lorapar_utils import cache

# From the ground up. A file may import what lies on a lower floor, and files of its own room.
FLOORS = (
    {"errors"},
    {"settings", "machine", "distributed", "partition", "optim"},
    {"cache", "importance"},
    {"data"},
    {"fast"},
    {"models"},
    {"voting"},
    {"records"},
    {"training", "evaluation"},
    {"pipeline"},
    {"planning", "report"},
    {"build"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = [path for path in sorted(cache.PACKAGE.rglob("*.py")) if path != cache.PACKAGE / "__init__.py"]
ROOMS = [path.parent for path in sorted(cache.PACKAGE.glob("*/__init__.py"))]


def room(path):
    return path.relative_to(cache.PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(cache.PACKAGE)))
def test_a_file_imports_from_lower_floors_only(path):
    imported = {name.split(".")[1] for name in cache._imports(path) if name.count(".")}
    upwards = {name for name in imported - {room(path)} if FLOOR[name] >= FLOOR[room(path)]}
    assert not upwards


def test_no_two_modules_import_each_other():
    """Also inside a room, and also where an import stands in a function."""
    below = {path: {file for name in cache._imports(path) for file in cache._files_of(name)[-1:]} for path in FILES}
    below = {path: {file for file in files if file in below} - {path} for path, files in below.items()}
    while leaves := [path for path, files in below.items() if not files & set(below)]:
        for path in leaves:
            del below[path]
    assert not below


def test_the_method_needs_nothing_of_ours_but_errors_and_distributed():
    for name in ("importance", "partition", "optim"):
        files = {path.stem for path in cache.code_files(cache.PACKAGE / f"{name}.py")}
        assert files <= {name, "__init__", "errors", "distributed"}


def test_the_top_level_has_at_most_ten_files():
    assert len(list(cache.PACKAGE.glob("*.py"))) <= 10
    assert {path.name for path in ROOMS} == set(FLOOR) - {path.stem for path in cache.PACKAGE.glob("*.py")}


@pytest.mark.parametrize("folder", ROOMS, ids=lambda folder: folder.name)
def test_a_room_says_in_one_sentence_what_it_is_for_and_what_it_must_not_import(folder):
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    assert text.count(". ") == 0 and text.endswith(".") and "import" in text
    assert f"  {folder.name}/" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_tests_lie_in_the_same_folders():
    rooms = {path.name for path in ROOMS}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")} - {"cluster"}
    assert folders <= rooms and len(folders) >= len(rooms) - 1


def test_report_needs_no_torch():
    modules = [f"lorapar_utils.report.{path.stem}" for path in (cache.PACKAGE / "report").glob("[!_]*.py")]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
