"""Inside the checker's sandbox: run the benchmark's tests against a stand-in for the model's function.

Read as text, after `carried.py`, and run by `python -I -S -c`; nothing of the project can be imported there.
"""
# ruff: noqa: F821 (`packed`, `unpacked`, `CannotBeCarried` are carried.py's)

import ast
import builtins
import os
import resource
import sys

LONGEST = 1 << 20  # characters of one answer

memory, processes, open_files, scratch, seconds, answers, calls, verdict = map(int, sys.argv[1:])
preamble, tests, function = ast.literal_eval(sys.stdin.read())
for limit, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(limit, (value, value))


class NoAnswer(BaseException):
    """Of no kind that a test would expect and catch."""


def candidate(*positional, **named):
    try:
        asked.write(ascii(packed((positional, named))) + "\n")
        asked.flush()
        line = told.readline(LONGEST)
        if not line.endswith("\n"):
            raise NoAnswer("no answer" if len(line) < LONGEST else "too long an answer")
        kind, value = ast.literal_eval(line)
        if kind == "returned":
            return unpacked(value)
        if kind == "kept":
            raise NoAnswer(f"the answer is of a kind that cannot be carried to the tests: {value}")
    except NoAnswer:
        raise
    except CannotBeCarried as error:
        raise NoAnswer(f"the tests ask with what cannot be carried to the program: {error}") from None
    except BaseException:
        raise NoAnswer("no answer, or not a literal") from None
    error = getattr(builtins, str(value), None)
    if not (isinstance(error, type) and issubclass(error, Exception)):
        error = RuntimeError
    raise error(f"raised by the program: {value}")


with os.fdopen(answers, errors="replace") as told, os.fdopen(calls, "w") as asked:
    namespace = {"__name__": "tests"}
    try:
        exec(compile(preamble, "preamble.py", "exec"), namespace)
        exec(compile(tests, "tests.py", "exec"), namespace)
        namespace[function] = candidate
        namespace["check"](candidate)
        said = "passed"
    except BaseException as error:
        said = f"failed: {type(error).__name__}: {error}"[:500]
    os.write(verdict, said.encode(errors="replace"))
    os._exit(0)
