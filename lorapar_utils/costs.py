"""What a profile needs before it starts: memory and time of every phase, from the model's configuration.

Passes are traced, not guessed: the model with its adapter is built without memory (torch's meta device) and each kind
of pass runs once through it, while a dispatch mode notes each operation's arithmetic, the bytes that it moves and the
memory that is held. A machine turns that into seconds: an operation takes as long as its arithmetic or its bytes,
whichever is longer, and a fixed time to call it.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Work:
    """What a pass costs on any machine.

    Attributes
    ----------
    operations
        (floating-point operations, bytes read and written) of each call.
    peak
        Bytes held at once at the most, beyond what was there before.
    """

    operations: tuple[tuple[int, int], ...]
    peak: int

    @property
    def flops(self) -> int:
        return sum(flops for flops, _ in self.operations)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, max(self.peak, other.peak))

    def seconds(self, machine: "Machine") -> float:
        return sum(max(f / machine.flops, b / machine.bandwidth) + machine.call for f, b in self.operations)


@dataclass(frozen=True)
class Machine:
    """What one process has: bytes of memory, operations and bytes a second, seconds a call, bytes taken by libraries."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    call: float
    libraries: float


class Trace(TorchDispatchMode):
    """Notes the work of what runs inside; tensors may be on the meta device."""

    def __init__(self):
        super().__init__()
        self.operations: list[tuple[int, int]] = []
        self.held = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        result = function(*args, **kwargs)
        after = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        storages = {t.untyped_storage()._cdata for t in before}
        written = [t for t in after if t.untyped_storage()._cdata not in storages]
        for tensor in written:
            self._hold(tensor.untyped_storage())
        if written or function._schema.is_mutable:
            counted = flop_registry.get(function.overloadpacket)
            flops = counted(*args, **kwargs, out_val=result) if counted else 0
            moved = sum(t.numel() * t.element_size() for t in (*before, *(written or after)))
            self.operations.append((flops, moved))
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.held -= size


def traced(function: Callable[[], object]) -> Work:
    """The work of one call of `function`."""
    with Trace() as trace:
        function()
    return Work(tuple(trace.operations), trace.peak)
