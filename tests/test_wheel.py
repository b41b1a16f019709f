"""The package from its wheel, without a clone."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import lorapar_utils


@pytest.fixture
def installed(tmp_path):
    """A folder with the installed wheel; the packages that it needs are those of the tests."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in names.stdout.splitlines():
        if name.startswith(
            ("lorapar_utils/", "profiles/", "book/", "setup.py", "pyproject.toml", "README.md", "LICENSE")
        ):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    assert f"-{lorapar_utils.__version__}-" in wheel.name
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    return tmp_path / "site"


def test_a_block_runs_and_is_judged_in_a_folder_of_ones_own(installed, saved_model, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    mine = {
        "extends": "smoke",
        "model": {"source": str(saved_model), "dtype": "float32"},
        "voting": {"split_by": "construction"},
        "experiments": {"cell": {"sweep": "theta", "method": "lorapar", "stages": ["sft"], "title": "a cell"}},
    }
    (home / "mine.yaml").write_text(json.dumps(mine))

    def run(*command):
        env = os.environ | {"PYTHONPATH": str(installed)}
        return subprocess.run([sys.executable, *command], cwd=home, env=env, capture_output=True, text=True)

    where = run("-c", "import lorapar_utils; print(lorapar_utils.__file__)")
    assert where.stdout.startswith(str(installed))
    block = run("-m", "lorapar_utils.pipeline.block", "mine.yaml", "0")
    assert block.returncode == 0, block.stderr[-2000:]
    record = json.loads((home / "runs" / "mine" / "records" / "cell-seed0.json").read_text())
    assert record["run"]["commit"] is None and record["result"]["metrics"]["stage1/loss"]["n"] > 0
    judged = run("-c", "from lorapar_utils.report import claims; print(claims.scoreboard({}).shape[0])")
    assert int(judged.stdout) == len(re.findall("^- claim:", (ROOT / "book" / "claims.yaml").read_text(), re.M))


def test_the_version_is_one():
    assert f"\nversion: {lorapar_utils.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert newest == lorapar_utils.__version__
