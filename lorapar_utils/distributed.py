"""Which process is this one, and what the first process does for all."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def state() -> PartialState:
    """Index of this process and number of processes: 0 of 1 unless `launch` started several."""
    return PartialState(cpu=not torch.cuda.is_available())


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
