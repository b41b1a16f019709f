"""Several processes: which one this is, what the first does for all, and a base whose layers are shared out (FSDP)."""

import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.distributed.fsdp import fully_shard


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


def share_out(model: torch.nn.Module, layers: Iterable[torch.nn.Module]) -> None:
    """Shard the frozen weights of every layer over the processes (FSDP2).

    Adapters, embeddings and head are not sharded. DDP averages the adapters' gradients as usual, and masks and
    optimizer state are the same as in one process.
    """
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    trained = {p for p in model.parameters() if p.requires_grad}
    for layer in layers:
        fully_shard(layer, ignored_params=trained)
    model._ddp_params_and_buffers_to_ignore = [*frozen, *(name for name, _ in model.named_buffers())]
