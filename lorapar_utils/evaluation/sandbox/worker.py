"""Inside the worker's sandbox: run the model's program, then answer calls of its function, one literal a line.

Read as text, after `carried.py`, and run by `python -I -S -c`; nothing of the project can be imported there.
"""
# ruff: noqa: F821 (`packed`, `unpacked`, `CannotBeCarried` are carried.py's)

import ast
import os
import resource
import sys

memory, processes, open_files, scratch, seconds, calls, answers = map(int, sys.argv[1:])
program, function = ast.literal_eval(sys.stdin.read())
for limit, value in (
    (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_NPROC, processes),
    (resource.RLIMIT_NOFILE, open_files),
    (resource.RLIMIT_FSIZE, scratch),
    (resource.RLIMIT_CPU, seconds),
    (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(limit, (value, value))

namespace = {"__name__": "program"}
try:
    exec(compile(program, "program.py", "exec"), namespace)
    candidate, broken = namespace[function], None
except BaseException as error:
    candidate, broken = None, error

with os.fdopen(calls) as asked, os.fdopen(answers, "w") as told:
    for line in asked:
        positional, named = unpacked(ast.literal_eval(line))
        try:
            if broken is not None:
                raise broken
            answer = ("returned", packed(candidate(*positional, **named)))
        except CannotBeCarried as error:
            answer = ("kept", str(error))
        except BaseException as error:
            # By the nearest name that the tests know too: they may expect a ValueError, and get a kind of it.
            answer = ("raised", next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"))
        told.write(ascii(answer) + "\n")
        told.flush()
