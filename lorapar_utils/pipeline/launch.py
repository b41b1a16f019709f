"""Run one phase in several processes on this machine. The profile's `processes` setting says how many.

Each process scores, generates and trains with a share of every batch. Only the first process writes files.
"""

import codecs
import json
import os
import re
import signal
import subprocess
import sys
import tempfile

import torch

from lorapar_utils import machine
from lorapar_utils.errors import InputError
from lorapar_utils.settings import Settings, working_root

LAST_CHARACTERS = 40_000
# A failure in the launcher's report. The launcher's log lines also have rank and code, but in another format.
REPORTED = r"^\s+rank\s+: (\d+).*?^\s+exitcode\s+: (-?\d+)"
LAUNCHER_REPORT = re.compile(r"^[WE]\d{4} .*torch/distributed/elastic", re.M)


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
    """Run a phase of `worker.PHASES` in `settings.processes` processes, and print their output here.

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
        command = [*launcher(count), "-m", "lorapar_utils.pipeline.worker", task.name]
        threads = str(max(1, machine.threads_from_environment(settings.threads) // count))
        group = subprocess.Popen(
            command,
            cwd=working_root(),
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
    output, decoder = "", codecs.getincrementaldecoder("utf-8")(errors="replace")
    # In chunks, because a progress bar ends no lines; a character may lie in two.
    while read := os.read(group.stdout.fileno(), 4096):
        chunk = decoder.decode(read)
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
