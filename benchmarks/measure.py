"""What benchmarks and tests measure with: a call's seconds, its peak of this process's memory, its operators."""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode


def timed(function: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_bytes(function: Callable[[], object]) -> int:
    """How far resident memory rises above its present size during one call (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def peak_resident() -> int:
    """The most memory that this process has had (Linux)."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


class Operators(TorchDispatchMode):
    """A context that counts, in `names`, the operators that compute or copy; a view does neither."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not operator.is_view:
            self.names[str(operator)] += 1
        return operator(*args, **(kwargs or {}))
