"""Cores, threads, hardware and file locks of the machine that a job runs on."""

import errno
import os
import platform
import sys
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, SoftFileLock

# Errors of network file systems and FUSE mounts without locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def usable_cores() -> int:
    """Number of cores that this process may use. macOS does not tell, so there it is the number of all cores."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_from_environment(default: int) -> int:
    """Threads for a torch job: `OMP_NUM_THREADS` if it is a positive number, else `default`; at most all usable cores.

    Clusters may set the variable to an empty string, to 0, or to a list of numbers, one per nesting level. Only the
    first number counts.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    threads = int(first) if first.isascii() and first.isdigit() else 0
    return min(threads or default, usable_cores())


# Instruction sets that decide in which dtype and how fast a CPU computes, as Linux names them (x86, then ARM).
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def hardware() -> dict:
    """The processor, its instruction sets and cores, and the GPU, None without one or before torch is imported.

    The sets are those of `INSTRUCTIONS`; only Linux tells them.
    """
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    cpu = platform.processor() or platform.machine()
    flags: set[str] = set()
    family: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        family = {
            key: line.split(":", 1)[1].strip()
            for line in lines
            for key in ("cpu family", "model")
            if line.split(":")[0].strip() == key
        }
        models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
        cpu = models[0] if models else cpu
        flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    known = [name for name in INSTRUCTIONS if name in flags]
    return {
        "cpu": cpu,
        "cpu_family": "/".join(family.values()) or None,
        "instructions": known,
        "cores": os.cpu_count(),
        "gpu": gpu,
    }


def compute_dtype(setting: str) -> str:
    """The dtype of `model.dtype`. `auto` is bfloat16 if the hardware multiplies bfloat16 natively, else float32."""
    if setting != "auto":
        return setting
    import torch  # here, because a page of tables needs none of it

    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported()
    else:
        native = torch.cpu.get_capabilities().get("avx512_bf16")
    return "bfloat16" if native else "float32"


def lock(path: Path, timeout: float = -1) -> AcquireReturnProxy:
    """Acquire the lock file `path` for a `with` block. A file system without locks gets a marker file beside `path`.

    Parameters
    ----------
    timeout
        Seconds to wait for another process; -1 waits without limit.

    Raises
    ------
    filelock.Timeout
        Another process held the lock for `timeout` seconds.
    """
    try:
        return FileLock(path, timeout=timeout, fallback_to_soft=False).acquire()
    except OSError as error:  # a Timeout is an OSError without a number
        if error.errno not in NO_LOCKS:
            raise
    marker = path.with_name(f"{path.name}.held")
    print(f"{path.parent} has no file locks: {marker.name} stands for one; if a machine died with it, delete it")
    return SoftFileLock(marker, timeout=timeout).acquire()
