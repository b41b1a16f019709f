"""Entry point of each process that `launch` starts: one phase, of which this process does its share."""

import io
import json
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from lorapar_utils import distributed
from lorapar_utils.errors import InputError
from lorapar_utils.pipeline.examples import Examples
from lorapar_utils.pipeline.experiment import experiment
from lorapar_utils.pipeline.scores import scores
from lorapar_utils.settings import Settings

# Longest wait for another process, such as for an evaluation by the first. accelerate notices a dead process at once.
PATIENCE = timedelta(hours=12)
PHASES = {"scores": lambda settings: scores(settings, Examples(settings).systems), "experiment": experiment}


def main(task: str) -> None:
    """Run the phase that the file `task` describes, and leave the process."""
    call = json.loads(Path(task).read_text(encoding="utf-8"))
    process = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    quiet = io.StringIO() if not process.is_main_process else None
    try:
        with redirect_stdout(quiet or sys.stdout), redirect_stderr(quiet or sys.stderr):
            PHASES[call["phase"]](Settings.model_validate(call["settings"]), *call["arguments"])
    except InputError as error:
        print(f"InputError: {error}", file=sys.stderr, flush=True)
        distributed.end(1)
    except Exception:
        traceback.print_exc()
        distributed.end(1)
    process.wait_for_everyone()
    distributed.end(0)


if __name__ == "__main__":
    main(sys.argv[1])
