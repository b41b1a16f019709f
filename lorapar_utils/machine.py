"""What the machine and the environment of a job offer: cores, threads, locks of files."""

import errno
import os
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, SoftFileLock

# What network file systems and FUSE mounts answer that have no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def usable_cores() -> int:
    """Cores that this process may use; all of them where the system does not tell, as macOS."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_from_environment(default: int) -> int:
    """Threads for a torch job: `OMP_NUM_THREADS` if that is a positive number, else `default`; no more than cores.

    Clusters also set it to nothing, to 0, or to a list with a number for each level of nesting, whose first one counts.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    wanted = int(first) if first.isascii() and first.isdigit() else 0
    return min(wanted or default, usable_cores())


def lock(path: Path, timeout: float = -1) -> AcquireReturnProxy:
    """Acquire the lock file `path`, for a `with` block; where the file system has no locks, a marker file beside it.

    Parameters
    ----------
    timeout
        Seconds to wait for another process; -1: as long as it takes.

    Raises
    ------
    filelock.Timeout
        Another process held it all that time.
    """
    try:
        return FileLock(path, timeout=timeout, fallback_to_soft=False).acquire()
    except OSError as error:  # also a Timeout, which has no number
        if error.errno not in NO_LOCKS:
            raise
    marker = path.with_name(f"{path.name}.held")
    print(f"{path.parent} has no file locks: {marker.name} stands for one; if a machine died with it, delete it")
    return SoftFileLock(marker, timeout=timeout).acquire()
