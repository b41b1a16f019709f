"""What the benchmarks measure with: seconds of a call, and the peak of this process's memory during one."""

import time
from collections.abc import Callable
from pathlib import Path


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
