"""`python -m lorapar_utils.build PROFILE`: check what can be checked, then let Snakemake run the DAG."""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import yaml
from filelock import Timeout

from lorapar_utils.errors import InputError
from lorapar_utils.machine import lock, usable_cores
from lorapar_utils.planning import plan, preflight
from lorapar_utils.records import claim_runs
from lorapar_utils.settings import Settings, load_profile, profile_files, project_root

FREE_BYTES = 1_000_000_000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", nargs="?", default="cpu", help="a name of profiles/, or the path of a YAML file")
    parser.add_argument("--cores", type=int, default=usable_cores())
    parser.add_argument("--cluster", default="", help="a folder of profiles/cluster: send the jobs there")
    parser.add_argument("--dry-run", action="store_true", help="show what it would take and what would run")
    parser.add_argument("--machine", default="here", help="of --dry-run: here, or a GPU of machines.yaml")
    options = parser.parse_args(arguments)
    try:
        if options.dry_run:
            print_plan(options.profile, options.machine)
        return build(options.profile, options.cores, cluster=options.cluster, dry_run=options.dry_run)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


def build(profile: str, cores: int, *, cluster: str = "", dry_run: bool = False) -> int:
    """Run the DAG of `profile`; returns Snakemake's exit code.

    Parameters
    ----------
    cores
        Of this machine, for jobs that run here.
    cluster
        A folder of `profiles/cluster`, whose executor runs the jobs; empty: this machine does.

    Raises
    ------
    InputError
        A profile that is invalid, has no experiments, needs more memory than there is, or has another file's runs; a
        cluster that is unknown or whose executor is not installed; a `runs/` that cannot be written or is full; another
        build under way.
    """
    settings = load_profile(profile)
    if not settings.experiment_runs():
        raise InputError(f"profile {settings.profile}: it has no experiments or no seeds; name some, or extend cpu")
    root = project_root()
    for path in profile_files(profile):
        if re.search("[{}]", str(path)):
            raise InputError(f"{path}: Snakemake takes what is in braces for a wildcard; rename the folder")
    runs = root / "runs"
    _check_writable(runs)
    claim_runs(settings)
    if not dry_run:
        _check_before(settings, here=not cluster)
    # As in an address (%20): Snakemake reads it as YAML, and hands it on to a cluster's jobs through a shell.
    asked = quote(settings.profile_file)
    command = [sys.executable, "-m", "snakemake", "--cores", str(cores), "--config", f"profile={asked}"]
    # Our own lock is released by the system when a process dies; Snakemake's would outlive a kill -9.
    command += ["--nolock", "--rerun-incomplete"] + (["--dry-run"] if dry_run else [])
    if cluster:
        command += ["--workflow-profile", str(_cluster_profile(cluster))]
    try:
        with lock(runs / ".lock", timeout=0):
            code = subprocess.run(command, cwd=root).returncode
    except Timeout:
        raise InputError(f"another build is running in {root}; wait for it, or stop it") from None
    if code:
        _explain(settings.runs / "logs")
    elif not dry_run:
        print(f"The book: {root / 'book' / '_build' / 'html' / 'index.html'}")
    return code


def _check_before(settings: Settings, here: bool) -> None:
    """Whether this machine has the memory, and of a first run whether all that it reads can be read."""
    first = not (settings.runs / "records" / "voting.json").is_file()
    # A cluster's nodes are not this machine, and the test profile fits any.
    memory = settings.publishable and here
    if not first and not memory:
        return

    if first:
        print("checking the model's files, the data, the teachers' files and keys …", flush=True)
        preflight.check(settings)
    if memory:
        machine = plan.memory_here()
        plan.check_fits(settings, machine, plan.phases_of(plan.Model(settings), machine))


def print_plan(profile: str, machine_name: str) -> None:
    """Memory and time of every phase on a machine; an `InputError` if it has no memory for one of them."""

    settings = load_profile(profile)
    machine = plan.machine_named(machine_name)
    model = plan.Model(settings)
    untimed = plan.memory_here() if machine_name == "here" else machine
    plan.check_fits(settings, untimed, plan.phases_of(model, untimed))
    if machine.flops is None:
        print("running a few layers on this machine …", flush=True)
    phases = plan.phases_of(model, machine)
    print(f"{plan.table(phases).round(2).to_string()}\n\n{plan.summary(settings, machine, phases)}\n")


def _cluster_profile(name: str) -> Path:
    folder = project_root() / "profiles" / "cluster" / name
    if not (folder / "config.yaml").is_file():
        known = sorted(path.parent.name for path in folder.parent.glob("*/config.yaml"))
        raise InputError(f"cluster: there is no profiles/cluster/{name}/config.yaml; there is {', '.join(known)}")
    executor = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["executor"]
    if not importlib.util.find_spec(f"snakemake_executor_plugin_{executor}"):
        raise InputError(f"cluster: the executor {executor!r} is not installed; .venv/bin/pip install -e '.[cluster]'")
    return folder


def _check_writable(runs: Path) -> None:
    try:
        runs.mkdir(exist_ok=True)
        probe = runs / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(f"runs: {runs} cannot be written ({error}); change its rights or clone elsewhere") from None
    free = shutil.disk_usage(runs).free
    if free < FREE_BYTES:
        raise InputError(f"runs: {free / 1e9:.1f} GB free at {runs}; make room for {FREE_BYTES / 1e9:.0f} GB")


def _explain(logs: Path) -> None:
    """What went wrong, from the newest log: the message if there is one, else where to look."""
    newest_last = sorted(logs.glob("*.log"), key=lambda path: path.stat().st_mtime)
    if not newest_last:
        return
    text = re.sub(r"\x1b\[[0-9;]*m", "", newest_last[-1].read_text(encoding="utf-8", errors="replace"))
    message = re.findall(r"^(?:[\w.]+\.)?InputError: (.+)", text, re.M) or re.findall(
        r"^[\w.]+(?:Error|Warning): .+", text, re.M
    )
    print(f"\n{message[-1] if message else 'The build stopped.'}\n(full log: {newest_last[-1]})", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
