"""`python -m lorapar_utils.build PROFILE`: check what can be checked, then let Snakemake run the DAG."""

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import psutil
import yaml
from filelock import Timeout

from lorapar_utils.cache import fingerprint, write_atomically
from lorapar_utils.errors import InputError
from lorapar_utils.machine import lock, usable_cores
from lorapar_utils.models.published import published_adapters
from lorapar_utils.planning import jobs
from lorapar_utils.records import claim_runs
from lorapar_utils.settings import Settings, load_profile, profile_files, project_root

FREE_BYTES = 1_000_000_000
# After Ctrl-C, seconds until what still runs is killed; and the exit status that shells give for it.
PATIENCE, STOPPED = 3, 130


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", nargs="?", default="laptop", help="a name of profiles/, or the path of a YAML file")
    parser.add_argument("--cores", type=int, default=usable_cores())
    parser.add_argument("--cluster", default="", help="a folder of profiles/cluster: send the jobs there")
    parser.add_argument("--read", action="store_true", help="the book from the published records; nothing is computed")
    parser.add_argument("--dry-run", action="store_true", help="show what it would take and what would run")
    parser.add_argument("--machine", default="here", help="of --dry-run: here, or a GPU of machines.yaml")
    options = parser.parse_args(arguments)
    try:
        if options.dry_run:
            print_plan(options.profile, options.machine, options.cores)
            return 0
        return build(options.profile, options.cores, cluster=options.cluster, read=options.read)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


def build(profile: str, cores: int, *, cluster: str = "", read: bool = False) -> int:
    """Run the DAG of `profile`; returns Snakemake's exit code.

    Parameters
    ----------
    cores
        Of this machine, for jobs that run here.
    cluster
        A folder of `profiles/cluster`, whose executor runs the jobs; empty: this machine does.
    read
        Make the pages from the published records; nothing is computed.

    Raises
    ------
    InputError
        A profile that is invalid, has no experiments, needs more memory than there is, or has another file's runs; a
        cluster that is unknown or whose executor is not installed; a `runs/` that cannot be written or is full; a
        published adapter that was changed; another build under way.
    """
    settings, root = _checked(profile), project_root()
    runs = root / "runs"
    _check_writable(runs)
    published_adapters()
    if not read:
        claim_runs(settings)
        _check_before(settings, here=not cluster)
    command = jobs.command(settings, cores, read=read)
    if cluster:
        command += ["--workflow-profile", str(_cluster_profile(cluster))]
    try:
        with lock(runs / ".lock", timeout=0):
            # A cluster's jobs are cancelled one by one, which may take longer.
            code = _run(command, root, None if cluster else PATIENCE)
    except Timeout:
        raise InputError(f"another build is running in {root}; wait for it, or stop it") from None
    if code == STOPPED:
        again = "read" if read else f"book PROFILE={shlex.quote(profile)}"
        print(f"\nStopped. `make {again}` goes on from here.", file=sys.stderr)
    elif not code:
        print(f"The book: {root / 'book' / '_build' / 'html' / 'index.html'}")
    return code


def _run(command: list[str], root: Path, patience: float | None) -> int:
    """Run Snakemake to its end; after Ctrl-C, until all that it started has ended, or is killed after `patience`."""
    (root / ".snakemake").mkdir(exist_ok=True)
    with (root / ".snakemake" / "errors.txt").open("w+", encoding="utf-8") as errors:
        process = psutil.Popen(command, cwd=root, stderr=errors)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # All have got the signal too. Kernels are in sessions of their own, and whoever is left is ended.
            started = [process, *process.children(recursive=True)]
            _, left = psutil.wait_procs(started, timeout=patience)
            for one in left:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            return STOPPED
        errors.seek(0)
        if code and (text := errors.read().strip()):
            print(text, file=sys.stderr)
    return code


def _checked(profile: str) -> Settings:
    settings = load_profile(profile)
    if not settings.experiment_runs():
        raise InputError(f"profile {settings.profile}: it has no experiments or no seeds; name some, or extend laptop")
    for path in profile_files(profile):
        if re.search("[{}]", str(path)):
            raise InputError(f"{path}: Snakemake takes what is in braces for a wildcard; rename the folder")
    return settings


def _check_before(settings: Settings, here: bool) -> None:
    """Check memory, and that all that a run reads can be read; once for each state of a profile.

    A cluster's nodes are not this machine, and the test profile fits any.
    """
    checked, state = settings.runs / "checked.txt", fingerprint([settings.model_dump(), here])
    if checked.is_file() and checked.read_text(encoding="utf-8") == state:
        return
    # Here, because these import torch, and an unchanged build needs none of it.
    import datasets

    from lorapar_utils.planning import plan, preflight

    warnings.simplefilter("ignore", FutureWarning)
    datasets.disable_progress_bars()
    print("checking the model's files, the data, the teachers' files and keys …", flush=True)
    preflight.check(settings)
    if settings.publishable and here:
        machine = plan.memory_here()
        plan.check_fits(settings, machine, plan.phases_of(plan.Model(settings), machine))
    write_atomically(checked, state)


def print_plan(profile: str, machine_name: str, cores: int) -> None:
    """What a build would do on a machine; an `InputError` if it has no memory for one of the phases."""
    settings, began = _checked(profile), time.time()
    import datasets

    from lorapar_utils.planning import plan

    warnings.simplefilter("ignore", FutureWarning)
    datasets.disable_progress_bars()
    # What has just been imported is what every job imports first, after a second for the rest.
    start = time.time() - began + 1
    machine = plan.machine_named(machine_name)
    model = plan.Model(settings)
    untimed = plan.memory_here() if machine_name == "here" else machine
    plan.check_fits(settings, untimed, plan.phases_of(model, untimed))
    due = jobs.would_run(settings, cores)
    if not due:
        print(f"{settings.profile}: everything is made; `make book` would do nothing.")
        return
    phases = plan.phases_of(model, machine)
    print(plan.as_text(settings, machine, plan.rows(settings, phases, due, cores, start)))


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


if __name__ == "__main__":
    sys.exit(main())
