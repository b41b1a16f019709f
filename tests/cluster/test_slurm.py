"""The smoke sweep on a real Slurm: what it makes is what this machine makes, whatever is cancelled or lost on the way."""

import json
import os
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import slurm
from conftest import copy_project


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


@contextmanager
def building(folder: Path, *arguments: str):
    """`make book` in the background; it does not outlive the block."""
    command = ["make", "book", "PROFILE=smoke", *arguments]
    with (folder / "build.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def records(folder: Path) -> dict[str, dict]:
    """Every record less what says when it was made, how long it took, and how much memory."""
    found = {}
    for path in sorted((folder / "runs/smoke/records").glob("*.json")):
        record = json.loads(path.read_text())
        for key in ("created", "seconds"):
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
    with building(folder) as process:
        assert process.wait() == 0, (folder / "build.log").read_text()[-3000:]
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
    with building(folder, "CLUSTER=slurm") as process:
        _, node = wait_for_job(cluster, "voting", process)
        assert node in ("node1", "node2")
        second = subprocess.run(
            ["make", "book", "PROFILE=smoke", "CLUSTER=slurm"], cwd=folder, capture_output=True, text=True
        )
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
