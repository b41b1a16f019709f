"""What a profile needs before it starts: memory and time of every phase, from the model's configuration.

Passes are traced, not guessed: the model with its adapter is built without memory (torch's meta device) and each kind
of pass runs once through it, while a dispatch mode notes each operation's arithmetic, the bytes that it moves and the
memory that is held. A machine turns that into seconds: an operation takes as long as its arithmetic or its bytes,
whichever is longer. On a CPU a fixed time to call each is added; calls to a GPU run ahead of it, so that a pass takes
what its operations need or what their calls need, whichever is longer.
"""

import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Shaped:
    """A tensor's layout, in place of the tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Operation:
    """A call of a torch operator: what it computes (operations, bytes), and enough to call it again."""

    function: Any
    leaves: tuple
    call: Any = field(compare=False, repr=False)  # (args, kwargs) with `Shaped` for tensors
    flops: int
    moved: int


@dataclass(frozen=True)
class Work:
    """What a pass costs on any machine: how often it calls what, and the most bytes that it holds at once.

    Attributes
    ----------
    pace
        How much longer a call takes than in a pass that records nothing for a backward pass.
    """

    operations: Counter[Operation]
    peak: int
    pace: float = 1.0

    @property
    def flops(self) -> int:
        return sum(count * operation.flops for operation, count in self.operations.items())

    def seconds(self, machine: "Machine") -> float:
        computing = sum(count * machine.seconds(operation) for operation, count in self.operations.items())
        calling = machine.overhead * sum(self.operations.values())
        return computing + calling if machine.flops is None else max(computing, self.pace * calling)


@dataclass(frozen=True)
class Machine:
    """What one process has to work with.

    Attributes
    ----------
    memory, libraries
        Bytes there are, and bytes that the libraries take themselves.
    flops, bandwidth
        Operations and bytes a second; None: operations are timed here, one of each kind.
    flops32
        Operations a second of products in fp32; None: as `flops`.
    overhead
        Seconds that a call takes beside its operation.
    cpu
        Whether what sequences share is read once (`bundles`); elsewhere batches are padded.
    """

    name: str
    memory: float
    libraries: float
    overhead: float
    flops: float | None = None
    bandwidth: float | None = None
    flops32: float | None = None
    cpu: bool = False

    def seconds(self, operation: Operation) -> float:
        if self.flops is None:
            return timed_here(operation)
        exact = self.flops32 and any(
            isinstance(leaf, Shaped) and leaf.dtype == torch.float32 for leaf in operation.leaves
        )
        return max(operation.flops / (self.flops32 if exact else self.flops), operation.moved / self.bandwidth)


@cache
def timed_here(operation: Operation) -> float:
    """Seconds of an operation on this machine's CPU, on tensors of its shapes: the median of three calls."""

    def tensor(like: Shaped) -> torch.Tensor:
        size = (
            1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride, strict=True)) if all(like.shape) else 0
        )
        fill = torch.ones if like.dtype.is_floating_point else torch.zeros
        return fill(size, dtype=like.dtype).as_strided(like.shape, like.stride)

    args, kwargs = tree_map_only(Shaped, tensor, operation.call)
    if "device" in kwargs:
        kwargs["device"] = "cpu"
    operation.function(*args, **kwargs)
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        operation.function(*args, **kwargs)
        taken.append(time.perf_counter() - began)
    return median(taken)


class Trace(TorchDispatchMode):
    """Notes the work of what runs inside; tensors may be on the meta device."""

    def __init__(self):
        super().__init__()
        self.operations: Counter[Operation] = Counter()
        self.held = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # Noted before the call: one in place may change what it is given.
        call = tree_map_only(torch.Tensor, _shaped, (tuple(args), dict(kwargs)))
        result = function(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in read}
        written = [tensor for tensor in made if tensor.untyped_storage()._cdata not in known]
        for tensor in written:
            self._hold(tensor.untyped_storage())
        if written or function._schema.is_mutable:
            counted = flop_registry.get(function.overloadpacket)
            flops = counted(*args, **kwargs, out_val=result) if counted else 0
            moved = sum(tensor.numel() * tensor.element_size() for tensor in (*read, *(written or made)))
            leaves = tuple(str(leaf) if isinstance(leaf, torch.device) else leaf for leaf in tree_leaves(call))
            self.operations[Operation(function, leaves, call, flops, moved)] += 1
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


def _shaped(tensor: torch.Tensor) -> Shaped:
    return Shaped(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def traced(function: Callable[[], object]) -> Work:
    """The work of one call of `function`."""
    with Trace() as trace:
        function()
    return Work(trace.operations, trace.peak)
