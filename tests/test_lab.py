"""`make lab`, asked as JupyterLab asks it: what it opens, and that a pair is one notebook."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from conftest import ROOT

TOKEN = "test"


@pytest.fixture
def lab(tmp_path):
    """The recipe of `make lab` in a copy of the project, on a free port; yields its address."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copytree(ROOT / ".jupyter", tmp_path / ".jupyter")
    # Under `make test` this is a make within a make, which would name its folder after the recipe.
    asked = ["make", "--no-print-directory", "-n", "lab"]
    recipe = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    setting, _, *arguments = shlex.split(recipe.splitlines()[-1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", *arguments, "--no-browser", "--allow-root", "--ip=127.0.0.1"]
    command += [f"--port={port}", f"--IdentityProvider.token={TOKEN}", "--ServerApp.port_retries=0"]
    name, _, _ = setting.partition("=")
    environment = os.environ | {name: str(tmp_path / ".jupyter"), "HOME": str(tmp_path)}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 90
        while True:
            try:
                ask(f"{address}/api/status")
                break
            except urllib.error.URLError:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.3)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def ask(address, content=None):
    headers = {"Authorization": f"token {TOKEN}"}
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address, data=data, headers=headers, method="GET" if data is None else "PUT")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.geturl(), answer.read()


def test_the_lab_opens_on_the_tour_asks_for_no_news_and_keeps_pairs_together(lab, tmp_path):
    arrived, _ = ask(f"{lab}/")
    assert arrived.endswith("/lab/tree/notebooks/00_tour.ipynb")
    news = json.loads(ask(f"{lab}/lab/api/settings/@jupyterlab/apputils-extension:notification")[1])
    assert news["schema"]["properties"]["fetchNews"]["default"] == "false"
    assert json.loads(ask(f"{lab}/api/contents/notebooks/01_voting.py?type=notebook")[1])["type"] == "notebook"
    found = json.loads(ask(f"{lab}/api/contents/notebooks/00_tour.ipynb?type=notebook")[1])
    cell = next(cell for cell in found["content"]["cells"] if "parameters" in cell["metadata"].get("tags", []))
    cell["source"] = cell["source"].replace("theta = 0.9", "theta = 0.7")
    ask(f"{lab}/api/contents/notebooks/00_tour.ipynb", {"type": "notebook", "content": found["content"]})
    assert "\ntheta = 0.7" in (tmp_path / "notebooks" / "00_tour.py").read_text()
