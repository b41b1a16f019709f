"""Run one phase in several processes on this machine. The profile's `processes` setting says how many.

Each process scores, generates and trains with a share of every batch. Only the first process writes files.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from lorapar_utils import machine
from lorapar_utils.errors import InputError
from lorapar_utils.settings import Settings, project_root

# Longest wait for another process, such as for an evaluation by the first. accelerate notices a dead process at once.
PATIENCE = timedelta(hours=12)
LAST_CHARACTERS = 40_000
# A failure in the launcher's report. The launcher's log lines also have rank and code, but in another format.
REPORTED = r"^\s+rank\s+: (\d+).*?^\s+exitcode\s+: (-?\d+)"
LAUNCHER_REPORT = re.compile(r"^[WE]\d{4} .*torch/distributed/elastic", re.M)


def state() -> PartialState:
    """Index of this process and number of processes: 0 of 1 unless `launch` started several."""
    return PartialState(cpu=not torch.cuda.is_available())


def are_to_start(settings: Settings) -> bool:
    """Whether a phase must be launched: the profile asks for several processes, and this is not one of them."""
    return settings.processes > 1 and "LOCAL_RANK" not in os.environ


def launcher(count: int) -> list[str]:
    """Command prefix that runs a Python program as `count` processes on this machine."""
    # With `--multi_gpu`, accelerate starts several processes on one machine. Without GPUs they communicate by gloo.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*command, "--main_process_port", "0"]


def launch(phase: str, settings: Settings, *arguments: object) -> None:
    """Run `phases.<phase>(settings, *arguments)` in `settings.processes` processes, and print their output here.

    Raises
    ------
    InputError
        There are fewer GPUs than processes, a process raised an InputError, or a process died.
    """
    count = settings.processes
    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        raise InputError(f"processes = {count}: this machine has {torch.cuda.device_count()} GPUs; lower processes")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as task:
        json.dump({"settings": settings.model_dump(mode="json"), "phase": phase, "arguments": arguments}, task)
        task.flush()
        command = [*launcher(count), "-m", "lorapar_utils.processes", task.name]
        threads = str(max(1, machine.threads_from_environment(settings.threads) // count))
        group = subprocess.Popen(
            command,
            cwd=project_root(),
            env=os.environ | {"OMP_NUM_THREADS": threads},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            output = _shown(group)
        except BaseException:
            group.terminate()
            raise
        finally:
            code = group.wait()
    if code:
        raise InputError(_why(output, count))


def _shown(group: subprocess.Popen) -> str:
    """Print the output of the processes at once, without the launcher's report. Return the last part of all output."""
    output = ""
    # In chunks, because a progress bar ends no lines.
    while chunk := os.read(group.stdout.fileno(), 4096).decode(errors="replace"):
        has_report = LAUNCHER_REPORT.search(output)
        output = (output + chunk)[-LAST_CHARACTERS:]
        if not has_report:
            print(LAUNCHER_REPORT.split(chunk)[0], end="", flush=True)
    return output


def _why(output: str, count: int) -> str:
    """The error message: an InputError of a process, or how a process died."""
    if messages := re.findall(r"^InputError: (.+)", output, re.M):
        return messages[-1]
    failures = [(int(rank), int(code)) for rank, code in re.findall(REPORTED, output, re.M | re.S)]
    # Report the process that was killed. The others fail because they lost it, or because the launcher stopped them.
    failures.sort(key=lambda pair: (pair[1] == -signal.SIGTERM, pair[1] >= 0))
    rank, code = failures[0] if failures else ("?", "?")
    how = f"was killed by {signal.Signals(-code).name}" if failures and code < 0 else f"ended with code {code}"
    return (
        f"processes: process {rank} of {count} {how}, and the others were stopped. What was finished is kept: run "
        "again to go on from the last checkpoint; if memory ran out, lower the batch sizes first"
    )


def by_first(make: Callable[[], object]) -> object:
    """Call `make` in the first process only, and return the result in every process."""
    if state().num_processes == 1:
        return make()
    results = [make() if state().is_main_process else None]
    return broadcast_object_list(results)[0]


def end(code: int) -> NoReturn:
    """Flush the output and leave this process at once.

    A normal exit sometimes aborts, because threads of the process group outlive it: a thread that frees a tensor while
    the interpreter ends kills the process, after all files were written.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(task: str) -> None:
    """Entry point of each launched process. `task` is the file that `launch` wrote."""
    from lorapar_utils import phases

    call = json.loads(Path(task).read_text(encoding="utf-8"))
    process = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    quiet = io.StringIO() if not process.is_main_process else None
    try:
        with redirect_stdout(quiet or sys.stdout), redirect_stderr(quiet or sys.stderr):
            getattr(phases, call["phase"])(Settings.model_validate(call["settings"]), *call["arguments"])
    except InputError as error:
        print(f"InputError: {error}", file=sys.stderr, flush=True)
        end(1)
    except Exception:
        traceback.print_exc()
        end(1)
    process.wait_for_everyone()
    end(0)


if __name__ == "__main__":
    main(sys.argv[1])
