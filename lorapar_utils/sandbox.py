"""Where model-written code runs: two sandboxes of the operating system, and nothing that the code says is believed.

Deviation: the benchmark's own checker runs program and tests in one process. Here an answer is what can be carried
between two (`sandboxed/carried.py`): the built-in kinds, `collections`, `Fraction` and `Decimal`, a subclass of these
as what it is built on, and an iterator as an iterator over its items. What is carried compares as it would there.
Judged wrong here and perhaps right there: an object of another class of the program's own, or one that is equal by that
class's rule alone; an answer of more than a million characters, or nested about a hundred deep; an iterator of more
than 100,000 items. The default of a `defaultdict` is carried where it is a built-in class. Answers and arguments are
copies: none of the 164 tests asks whether two are one object, or looks at an argument after the call.

The *worker* runs the model's program and answers calls of its function. The *checker*, in a sandbox of its own, runs
the benchmark's tests against a stand-in that passes each call on. Only literals travel back, and from them the checker
builds values of a fixed list of kinds, whose code is Python's. So the program can neither print a verdict, nor patch
the tests, nor end the process that judges it: all it can do is to return the right values.

bubblewrap gives each of the two fresh namespaces (no network, no other process, no file but Python's own library, a
small empty `/tmp`); rlimits bound time, memory, processes, files. There is no fallback where that cannot be had.
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

PYTHON = "/python"  # where the sandbox has it
ENVIRONMENT = {"PATH": "/usr/bin:/bin"}  # of what starts it; inside there is none
FIRST_USER, USERS = 61_184, 4_000  # that no machine has of its own; systemd lends them to services
CARRIED, WORKER, CHECKER = (
    Path(__file__).parent / "sandboxed" / f"{name}.py" for name in ("carried", "worker", "checker")
)


@dataclass(frozen=True)
class Limits:
    """What a program may use: wall-clock seconds, memory of each process and of `/tmp` in bytes, and counts."""

    seconds: float = 10.0
    memory: int = 1 << 29
    scratch: int = 16 << 20
    processes: int = 8
    open_files: int = 32


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed its tests, and if not, why: `failed: …` by a test, else what stopped it."""

    passed: bool
    reason: str


def run_tests(program: str, tests: str, function: str, *, preamble: str = "", limits: Limits | None = None) -> Verdict:
    """Run `check(candidate)` of `tests` against `function` of a program that nobody trusts.

    Parameters
    ----------
    program
        The model's code; defines `function`.
    tests
        The benchmark's code; defines `check(candidate)`, which raises where the candidate is wrong.
    preamble
        The benchmark's own code that `tests` may use, such as the prompt with its helper functions.

    Raises
    ------
    InputError
        No bubblewrap, or an operating system that refuses it.
    """
    limits = limits or Limits()
    require_sandbox()
    # The worker's answers to the checker, the checker's calls to the worker, the checker's verdict to us.
    (answers_out, answers_in), (calls_out, calls_in), (verdict_out, verdict_in) = os.pipe(), os.pipe(), os.pipe()
    given = {
        WORKER: (repr((program, function)), (calls_out, answers_in)),
        CHECKER: (repr((preamble, tests, function)), (answers_out, calls_in, verdict_in)),
    }
    with contextlib.ExitStack() as stack:
        verdict = stack.enter_context(os.fdopen(verdict_out, errors="replace"))
        try:
            for number, (script, (told, fds)) in enumerate(given.items()):
                process = stack.enter_context(_started(script, fds, limits, number))
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(told.encode(errors="replace"))
                    process.stdin.close()
        finally:
            # The sandboxes hold these now; kept open here, the end of one would not be seen by the other.
            for fd in (answers_out, answers_in, calls_out, calls_in, verdict_in):
                os.close(fd)
        try:
            process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            return Verdict(False, f"no end within {limits.seconds:g} s")
        said = verdict.read(1000)
    return Verdict(said == "passed", said or "the checker was stopped")


@functools.cache
def require_sandbox() -> None:
    """Nothing, once it is known that the sandbox works here.

    Raises
    ------
    InputError
        It does not; says what to install or allow.
    """
    if shutil.which("bwrap") is None:
        raise InputError(
            "sandbox: bubblewrap is missing, and model-written code runs nowhere else; install `bubblewrap` (Linux)"
        )
    done = subprocess.run([*_bubblewrap(Limits(), 0), "true"], capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode:
        raise InputError(
            f"sandbox: bubblewrap cannot start here ({done.stderr.strip()[-200:]}); allow user namespaces "
            "(sysctl kernel.unprivileged_userns_clone=1), or leave model-written code unrun"
        )


def _bubblewrap(limits: Limits, number: int) -> list[str]:
    """Every namespace unshared, none that could be made inside, Python and `/usr` to read, nothing else."""
    library, first = sys.base_prefix, []
    if os.geteuid() == 0:
        # Root's processes cannot be counted and its files would be the sandbox's: become somebody else first, for whom
        # Python, perhaps in root's home, is put where it can be read.
        user = FIRST_USER + (2 * os.getpid() + number) % USERS
        first = ["bwrap", "--unshare-pid", "--die-with-parent", "--dev-bind", "/", "/", "--ro-bind", library, "/mnt"]
        first += ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        library = "/mnt"
    command = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
    # The program is process 1: there is no other whose memory or environment it could look at.
    command += ["--as-pid-1"]
    command += ["--clearenv", "--setenv", "LD_LIBRARY_PATH", f"{PYTHON}/lib", "--hostname", "sandbox"]
    command += ["--ro-bind", "/usr", "/usr", "--perms", "0755", "--dir", PYTHON, "--ro-bind", library, PYTHON]
    for place in map(Path, ("/bin", "/lib", "/lib64")):
        if place.is_symlink():
            command += ["--symlink", os.readlink(place), str(place)]
        elif place.is_dir():
            command += ["--ro-bind", str(place), str(place)]
    command += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", str(limits.scratch), "--tmpfs", "/tmp"]
    return [*first, *command, "--remount-ro", "/", "--remount-ro", "/dev", "--chdir", "/tmp"]


@contextlib.contextmanager
def _started(script: Path, fds: tuple[int, ...], limits: Limits, number: int) -> Iterator[subprocess.Popen]:
    """Python in a sandbox, running `script` with `fds` until the block ends; what it is to run comes by its stdin."""
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
        # The first process of its namespace goes with it, and takes along whatever was started there.
        process.kill()
        process.wait()
