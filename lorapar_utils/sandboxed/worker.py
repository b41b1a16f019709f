"""Inside the worker's sandbox: run the model's program, then answer calls of its function, one literal a line.

Read as text and run by `python -I -S -c`; nothing of the project can be imported there.
"""

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
        positional, named = ast.literal_eval(line)
        try:
            if broken is not None:
                raise broken
            answer = ("returned", candidate(*positional, **named))
        except BaseException as error:
            answer = ("raised", type(error).__name__)
        told.write(repr(answer) + "\n")
        told.flush()
