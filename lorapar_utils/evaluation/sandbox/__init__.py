"""Runs model-written code and the benchmark's tests in two separate sandboxes of the operating system.

The *worker* runs the model's program and answers calls to the tested function. The *checker*, in a second sandbox, runs
the benchmark's tests against a stand-in that forwards each call to the worker. The worker sends literals back, and the
checker builds values from them with a fixed list of Python's own types. So the program cannot print a verdict, patch
the tests or end the checker. It can pass only by returning the right values.

bubblewrap gives each sandbox fresh namespaces (no network, no other process, no file but Python's library, a small
empty `/tmp`). rlimits bound time, memory, processes and files. There is no fallback without bubblewrap.

Deviation: the benchmark's checker runs program and tests in one process. Here values are copied between two processes
(`carried.py`). Built-in types, `collections`, `Fraction` and `Decimal` can be copied. A subclass of these
becomes an instance of the base type, and an iterator becomes an iterator over the same items. Copies compare as the
originals do. A right answer may be judged wrong if it is an object of another class that the program defines, equals
the reference only by this class's `__eq__`, has more than a million characters, is nested about a hundred deep, or is
an iterator of more than 100,000 items. A `defaultdict` keeps a default factory that is a built-in class. None of the
164 tests checks object identity or looks at an argument after the call, so copies suffice.
"""

import contextlib
import functools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorapar_utils.errors import InputError

PYTHON = "/python"  # path inside the sandbox
ENVIRONMENT = {"PATH": "/usr/bin:/bin"}  # of bubblewrap; the sandbox has no environment
FIRST_USER, USERS = 61_184, 4_000  # user ids that no account has; systemd uses them for dynamic users
CARRIED, WORKER, CHECKER = (Path(__file__).parent / f"{name}.py" for name in ("carried", "worker", "checker"))


@dataclass(frozen=True)
class Limits:
    """Limits of a program: wall-clock seconds, bytes of memory per process and of `/tmp`, processes, open files."""

    seconds: float = 10.0
    memory: int = 1 << 29
    scratch: int = 16 << 20
    processes: int = 8
    open_files: int = 32


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed the tests. Otherwise `reason` is `failed: …` for a test, or says what stopped it."""

    passed: bool
    reason: str


def run_tests(program: str, tests: str, function: str, *, preamble: str = "", limits: Limits | None = None) -> Verdict:
    """Run `check(candidate)` of `tests` against `function` of an untrusted program.

    Parameters
    ----------
    program
        The model's code; defines `function`.
    tests
        The benchmark's code; defines `check(candidate)`, which raises if the candidate is wrong.
    preamble
        The benchmark's code that `tests` may use, such as helper functions in the prompt.

    Raises
    ------
    InputError
        bubblewrap is missing, or the operating system refuses to run it.
    """
    limits = limits or Limits()
    require_sandbox()
    # The worker's answers to the checker, the checker's calls to the worker, the checker's verdict to us.
    (answers_out, answers_in), (calls_out, calls_in), (verdict_out, verdict_in) = os.pipe(), os.pipe(), os.pipe()
    tasks = {
        WORKER: (repr((program, function)), (calls_out, answers_in)),
        CHECKER: (repr((preamble, tests, function)), (answers_out, calls_in, verdict_in)),
    }
    with contextlib.ExitStack() as stack:
        verdict = stack.enter_context(os.fdopen(verdict_out, errors="replace"))
        try:
            for number, (script, (task, fds)) in enumerate(tasks.items()):
                process = stack.enter_context(_started(script, fds, limits, number))
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(task.encode(errors="replace"))
                    process.stdin.close()
        finally:
            # The sandboxes hold copies. An open end here would hide the end of one sandbox from the other.
            for fd in (answers_out, answers_in, calls_out, calls_in, verdict_in):
                os.close(fd)
        try:
            process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            return Verdict(False, f"no end within {limits.seconds:g} s")
        message = verdict.read(1000)
    return Verdict(message == "passed", message or "the checker was stopped")


@functools.cache
def require_sandbox() -> None:
    """Raise an InputError unless the sandbox works on this machine. The check runs once.

    Raises
    ------
    InputError
        The sandbox does not work. The message says what to install or allow.
    """
    if shutil.which("bwrap") is None:
        raise InputError(
            "sandbox: bubblewrap is missing, and model-written code runs nowhere else; install `bubblewrap` (Linux)"
        )
    result = subprocess.run([*_bubblewrap(Limits(), 0), "true"], capture_output=True, text=True, env=ENVIRONMENT)
    if result.returncode:
        raise InputError(
            f"sandbox: bubblewrap cannot start here ({result.stderr.strip()[-200:]}); allow user namespaces "
            "(sysctl kernel.unprivileged_userns_clone=1), or leave model-written code unrun"
        )


def _bubblewrap(limits: Limits, number: int) -> list[str]:
    """Command for a sandbox that unshares all namespaces, forbids new ones and has read-only Python and `/usr`."""
    library, first = sys.base_prefix, []
    if os.geteuid() == 0:
        # The process limit does not apply to root, and root's files would be readable. So change to another user first,
        # and mount Python, which may be in root's home, where this user can read it.
        user = FIRST_USER + (2 * os.getpid() + number) % USERS
        first = ["bwrap", "--unshare-pid", "--die-with-parent", "--dev-bind", "/", "/", "--ro-bind", library, "/mnt"]
        first += ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        library = "/mnt"
    command = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
    # The program is process 1, so it sees no other process's memory or environment.
    command += ["--as-pid-1"]
    command += ["--clearenv", "--setenv", "LD_LIBRARY_PATH", f"{PYTHON}/lib", "--hostname", "sandbox"]
    command += ["--ro-bind", "/usr", "/usr", "--perms", "0755", "--dir", PYTHON, "--ro-bind", library, PYTHON]
    for path in map(Path, ("/bin", "/lib", "/lib64")):
        if path.is_symlink():
            command += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            command += ["--ro-bind", str(path), str(path)]
    command += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", str(limits.scratch), "--tmpfs", "/tmp"]
    return [*first, *command, "--remount-ro", "/", "--remount-ro", "/dev", "--chdir", "/tmp"]


@contextlib.contextmanager
def _started(script: Path, fds: tuple[int, ...], limits: Limits, number: int) -> Iterator[subprocess.Popen]:
    """Run `script` with `fds` in a sandbox until the block ends. The script reads its task from stdin."""
    python = f"{PYTHON}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    seconds = math.ceil(limits.seconds) + 1
    values = (limits.memory, limits.processes, limits.open_files, limits.scratch, seconds, *fds)
    code = CARRIED.read_text(encoding="utf-8") + script.read_text(encoding="utf-8")
    command = [*_bubblewrap(limits, number), python, "-I", "-S", "-c", code, *map(str, values)]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=pipe, stdout=null, stderr=null, pass_fds=fds, env=ENVIRONMENT)
    try:
        yield process
    finally:
        # This also ends the namespace's first process, and with it all other processes in the namespace.
        process.kill()
        process.wait()
