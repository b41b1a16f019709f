"""The smoke sweep on a real Slurm: what it makes is what this machine makes, whatever is cancelled or lost on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import copy_project

STARTED: list[subprocess.Popen] = []
# What may differ between two runs of the same settings.
TIMES = ("created", "seconds", "command", "commit", "dirty")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    slurm.install()
    with slurm.running(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def project(folder: Path) -> Path:
    copy_project(folder)
    profile = folder / "profiles" / "cluster" / "slurm" / "config.yaml"
    # A small cluster that answers at once: jobs are looked at sooner, and fit its nodes.
    text = profile.read_text().replace(
        "latency-wait: 60", "latency-wait: 5\nslurm-init-seconds-before-status-checks: 5"
    )
    profile.write_text(text.replace("mem_mb: 8000", "mem_mb: 5000").replace("mem_mb: 6000", "mem_mb: 5000"))
    return folder


def build(folder: Path, environment: dict, *arguments: str) -> subprocess.Popen:
    command = ["make", "book", "PROFILE=smoke", *arguments]
    log = (folder / "build.log").open("a")
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True, scope="module")
def no_build_outlives_its_test():
    yield
    for process in STARTED:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def records(folder: Path) -> dict[str, dict]:
    found = {}
    for path in sorted((folder / "runs/smoke/records").glob("*.json")):
        record = json.loads(path.read_text())
        for key in TIMES:
            record["run"].pop(key)
        metrics = record["result"]["metrics"]
        for key in [key for key in metrics if key.endswith(("_seconds", "peak_bytes"))]:
            metrics.pop(key)
        for rows in record["result"]["tables"].values():
            for row in rows:
                for key in [key for key in row if "time" in key or "runtime" in key or "per_second" in key]:
                    row.pop(key)
        found[path.stem] = record
    return found


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = project(tmp_path_factory.mktemp("local"))
    assert build(folder, dict(os.environ)).wait() == 0, (folder / "build.log").read_text()[-3000:]
    return records(folder)


def wait_for_job(cluster, words: str, process: subprocess.Popen, unlike: str = "") -> tuple[str, str]:
    """(id, node) of a running job whose comment holds `words`."""
    deadline = time.monotonic() + 1200
    while time.monotonic() < deadline and process.poll() is None:
        for number, state, node, comment in cluster.jobs():
            if state == "RUNNING" and words in comment and number != unlike:
                return number, node
        time.sleep(0.3)
    raise TimeoutError(f"no job of {words} ran: {cluster.jobs()}")


def test_a_sweep_makes_what_this_machine_makes_whatever_happens_to_its_jobs(cluster, local, tmp_path):
    """A second user is refused, a job is cancelled, a node is lost with all that runs on it: they cost time only."""
    folder = project(tmp_path)
    process = build(folder, cluster.environment, "CLUSTER=slurm")
    _, node = wait_for_job(cluster, "voting", process)
    assert node in ("node1", "node2")
    second = subprocess.run(
        ["make", "book", "PROFILE=smoke", "CLUSTER=slurm"],
        cwd=folder, env=cluster.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert second.returncode != 0 and "another build is running" in second.stderr
    cancelled, _ = wait_for_job(cluster, "lorapar-seed0", process)
    cluster.ask("scancel", cancelled)
    _, node = wait_for_job(cluster, "lorapar-seed0", process, unlike=cancelled)
    cluster.lose_node(node)
    cluster.wait_until(lambda: node in cluster.ask("sinfo", "-h", "-N", "-t", "down", "-o", "%N"), "a lost node")
    cluster.start_node(node)
    assert process.wait() == 0, (folder / "build.log").read_text()[-5000:]
    assert len(local) >= 7 and records(folder) == local
    assert (folder / "book/_build/html/index.html").is_file()
