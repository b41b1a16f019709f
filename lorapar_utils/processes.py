"""One phase by several processes of this machine, under `accelerate launch`: `processes` of a profile.

Each process scores, generates and trains with its share of every batch. The first one alone writes.
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

# A process may wait for the first one's evaluation; one that died is noticed at once, by accelerate.
PATIENCE = timedelta(hours=12)
LAST_CHARACTERS = 40_000
# A failure in the launcher's report. Its log names a local rank and a code too, in one line and in the other order.
REPORTED = r"^\s+rank\s+: (\d+).*?^\s+exitcode\s+: (-?\d+)"
LAUNCHER_REPORT = re.compile(r"^[WE]\d{4} .*torch/distributed/elastic", re.M)


def state() -> PartialState:
    """Which of how many processes this is; one of one unless launched as several."""
    return PartialState(cpu=not torch.cuda.is_available())


def are_to_start(settings: Settings) -> bool:
    """Whether a phase has to be handed to several processes: the profile wants them, and this is not one of them."""
    return settings.processes > 1 and "LOCAL_RANK" not in os.environ


def launcher(count: int) -> list[str]:
    """The command that starts what follows it as `count` processes of this machine."""
    # `--multi_gpu` is how accelerate starts several processes on one machine; without a GPU they meet by gloo.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*command, "--main_process_port", "0"]


def launch(phase: str, settings: Settings, *arguments: object) -> None:
    """Run `phases.<phase>(settings, *arguments)` in `settings.processes` processes; what they print is printed here.

    Raises
    ------
    InputError
        More processes than GPUs, what a process itself raised, or which one ended how.
    """
    count = settings.processes
    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        raise InputError(f"processes = {count}: this machine has {torch.cuda.device_count()} GPUs; lower processes")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as task:
        given = {"settings": settings.model_dump(mode="json"), "phase": phase, "arguments": arguments}
        json.dump(given, task)
        task.flush()
        command = [*launcher(count), "-m", "lorapar_utils.processes", task.name]
        threads = str(max(1, machine.threads_from_environment(settings.threads) // count))
        running = subprocess.Popen(
            command,
            cwd=project_root(),
            env=os.environ | {"OMP_NUM_THREADS": threads},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            said = _shown(running)
        except BaseException:
            running.terminate()
            raise
        finally:
            code = running.wait()
    if code:
        raise InputError(_why(said, count))


def _shown(running: subprocess.Popen) -> str:
    """Print what the processes say as they say it, without the launcher's own report; return the end of all of it."""
    said = ""
    # Not line by line: a progress bar only returns to the start of its line.
    while chunk := os.read(running.stdout.fileno(), 4096).decode(errors="replace"):
        reported = LAUNCHER_REPORT.search(said)
        said = (said + chunk)[-LAST_CHARACTERS:]
        if not reported:
            print(LAUNCHER_REPORT.split(chunk)[0], end="", flush=True)
    return said


def _why(said: str, count: int) -> str:
    own = re.findall(r"^InputError: (.+)", said, re.M)
    if own:
        return own[-1]
    ended = [(int(rank), int(code)) for rank, code in re.findall(REPORTED, said, re.M | re.S)]
    # One that was killed is the cause; others lost it, which is an error of theirs, or were told to stop (SIGTERM).
    ended.sort(key=lambda pair: (pair[1] == -signal.SIGTERM, pair[1] >= 0))
    rank, code = ended[0] if ended else ("?", "?")
    how = f"was killed by {signal.Signals(-code).name}" if ended and code < 0 else f"ended with code {code}"
    return (
        f"processes: process {rank} of {count} {how}, and the others were stopped. What was finished is kept: run "
        "again to go on from the last checkpoint; if memory ran out, lower the batch sizes first"
    )


def by_first(make: Callable[[], object]) -> object:
    """What `make` returns in the first process, in all of them; the others wait for it."""
    if state().num_processes == 1:
        return make()
    found = [make() if state().is_main_process else None]
    return broadcast_object_list(found)[0]


def end(code: int) -> NoReturn:
    """Leave this process at once, with all that it printed.

    In order, it would abort now and then: the group's threads outlive the group, and one that lets go of a tensor
    while the interpreter ends takes the whole process along, after everything was written.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(task: str) -> None:
    """What each launched process runs."""
    from lorapar_utils import phases

    given = json.loads(Path(task).read_text(encoding="utf-8"))
    own = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    quiet = io.StringIO() if not own.is_main_process else None
    try:
        with redirect_stdout(quiet or sys.stdout), redirect_stderr(quiet or sys.stderr):
            getattr(phases, given["phase"])(Settings.model_validate(given["settings"]), *given["arguments"])
    except InputError as error:
        print(f"InputError: {error}", file=sys.stderr, flush=True)
        end(1)
    except Exception:
        traceback.print_exc()
        end(1)
    own.wait_for_everyone()
    end(0)


if __name__ == "__main__":
    main(sys.argv[1])
