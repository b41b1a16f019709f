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
from contextlib import closing

import pytest
import websocket
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
    setting, _, *arguments = shlex.split(recipe.replace("\\\n", "").splitlines()[-1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", *arguments, "--no-browser", "--ip=127.0.0.1"]
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


def ask(address, content=None, method="PUT"):
    headers = {"Authorization": f"token {TOKEN}"}
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address, data=data, headers=headers, method="GET" if data is None else method)
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


def test_a_kernel_of_the_lab_answers_and_warns_of_nothing(lab, tmp_path):
    kernel = json.loads(ask(f"{lab}/api/kernels", {"name": "python3"}, method="POST")[1])
    header = {
        "msg_id": "1",
        "msg_type": "execute_request",
        "session": "1",
        "username": "",
        "date": "",
        "version": "5.3",
    }
    content = {"code": "print(6 * 7)", "silent": False, "store_history": False, "user_expressions": {}}
    asked = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
    address = f"{lab.replace('http', 'ws')}/api/kernels/{kernel['id']}/channels?token={TOKEN}&session_id=1"
    with closing(websocket.create_connection(address, timeout=60)) as socket_:
        socket_.send(json.dumps(asked))
        while (answer := json.loads(socket_.recv()))["msg_type"] != "stream":
            pass
    assert answer["content"]["text"] == "42\n"
    log = (tmp_path / "log").read_text()
    warnings = [line for line in log.splitlines() if "WARNING" in line or "[W " in line]
    # The server's own default for a dead connection, which tornado calls too long; at what it asks for, live ones end.
    assert "Kernel started" in log and not [line for line in warnings if "websocket_ping_timeout" not in line], log
