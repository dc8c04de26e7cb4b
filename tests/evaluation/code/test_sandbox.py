"""Attacks on the sandbox; each ends as a failed sample and nothing else."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lm.cli import main
from lm.evaluation.code import sandbox
from lm.evaluation.code.sandbox import LAYERS, Limits, available_layers, run_tests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a sandbox of Linux")
QUICK = Limits(seconds=1)
SOLVED = "\ndef f(x):\n    return x + 1\n"  # what an attack is followed by
TESTS = {
    "setup": "def helper(x):\n    return x",
    "tested": ["f"],
    "statements": ["def check(c):\n    assert c(2) == 3\n    assert helper(c(1)) == 2", "check(f)"],
}


def outcome(program, tests=TESTS, limits=QUICK, layers=()):
    return run_tests(program, tests, limits, layers)


def attacks(folder):
    """Programs that solve the problem if they get away with what they do."""
    me, secret = os.getpid(), folder / "secret"
    secret.write_text("x")
    return {
        "fork": "import os\nos.fork()",
        "daemon": "import os\nos.setsid()\nos.fork()",
        "thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(9,)).start()",
        "command": "import subprocess\nsubprocess.run(['/bin/true'])",
        "exec": "import os\nos.execv('/bin/true', ['true'])",
        "exit": "import os\nos._exit(0)",
        "system_exit": "import sys\nsys.exit(0)",
        "at_exit": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit",
        "crash": "import ctypes\nctypes.string_at(0)",
        "memory": "x = [0] * (10 * 2**30 // 8)",
        "reserve": "x = bytes(10 * 2**30)",
        "read": f"open({str(secret)!r})",
        "home": "import os, pathlib\nos.listdir(os.environ.get('HOME') or pathlib.Path.home())",
        "root": "import os\nos.listdir('/root')",
        "list": "import os\nos.listdir('/')",
        "repository": f"open({__file__!r})",
        "write": f"open({str(folder / 'new')!r}, 'w')",
        "remove": f"import os\nos.remove({str(secret)!r})",
        "library": "import os\nopen(os.__file__, 'r+')",
        "chmod": "import os\nos.chmod(os.environ['TMPDIR'], 0)",
        "parent": f"open('/proc/{me}/environ')",
        "network": "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "datagram": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "unix": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0name')",
        "datagrams": "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "kill": f"import os\nos.kill({me}, 0)",
        "kill_all": "import os\nos.kill(-1, 9)",
        "trace": f"import ctypes\nassert ctypes.CDLL(None).ptrace(16, {me}, 0, 0) == 0",
        "limits": f"import resource\nresource.prlimit({me}, resource.RLIMIT_CPU)",
        "raise": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
        "segment": "import ctypes\nassert ctypes.CDLL(None).shmget(1, 10**6, 0o1666) >= 0",
        "namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "disk": "for i in range(40):\n    open(str(i), 'wb').write(bytes(10**6))\n"
        "import time\ntime.sleep(0.3)",
        "file": "open('big', 'wb').write(bytes(2**25))",
    }


FORGERIES = {
    "equals": """
class A:
    def __eq__(self, other):
        return True
def f(x):
    return A()""",
    "subclass": """
class A(int):
    def __eq__(self, other):
        return True
def f(x):
    return A(7)""",
    "calculates": """
class A:
    def __getattr__(self, name):
        return lambda *others: A()
    __add__ = __sub__ = __rsub__ = __abs__ = lambda *others: A()
    __lt__ = __gt__ = __eq__ = __bool__ = __contains__ = lambda *others: True
def f(x):
    return A()""",
    "helper": """
import sys
for module in list(sys.modules.values()):
    module.helper = lambda x: x - 7
def helper(x):
    return x - 7
def f(x):
    return x + 8""",
    "builtins": """
import builtins
builtins.AssertionError = builtins.len = None
def f(x):
    return 9""",
    "exit": """
def f(x):
    raise SystemExit(0)""",
    "exit_process": """
import os
def f(x):
    os._exit(0)""",
    "report": """
import os
for i in range(64):
    for text in (b'"ready"\\n', b'{"passed": true}\\n'):
        try:
            os.write(i, text)
        except OSError:
            pass
def f(x):
    return 9""",
    "objects": """
import gc
for found in gc.get_objects():
    if isinstance(found, dict) and 'tests' in found:
        found['tests'] = {'setup': '', 'tested': [], 'statements': []}
def f(x):
    return 9""",
    "error": """
def f(x):
    raise type('A', (BaseException,), {})""",
    "deep": """
def f(x):
    found = []
    for _ in range(10**5):
        found = [found]
    return found""",
    "cycle": """
def f(x):
    found = []
    found.append(found)
    return found""",
    "bytes": """
import os
for i in range(3, 64):
    try:
        os.write(i, bytes([255, 10]))
    except OSError:
        pass
def f(x):
    return x + 1""",
    "syntax": "def f(x:",
    "null": "def f(x):\n    return x + 1\0",
    "nothing": "",
}
ENDLESS = {
    "loop": """
import signal
for n in range(1, 65):
    try:
        signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass""",
    "pattern": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "output": "while True:\n    print('x' * 10**6)",
    "sleep": "import time\ntime.sleep(1000)",
    "files": """
i = 0
while True:
    i += 1
    try:
        open(str(i), 'w').close()
    except OSError:
        pass""",
}


@pytest.fixture(scope="module", autouse=True)
def _confined():
    assert available_layers() == LAYERS  # else these tests say little about either


def test_programs_pass_and_fail():
    assert outcome(SOLVED).passed
    assert outcome(SOLVED.replace("+", "-")).reason == "AssertionError"
    assert "NameError" in outcome("def g(x):\n    return 2").reason
    noisy = "import sys\nprint('x' * 10**6)\nsys.stderr.write('x' * 10**6)"
    assert outcome(noisy + SOLVED).passed


@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_alone_fails_every_attack(layer, tmp_path):
    found = attacks(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        verdicts = pool.map(lambda text: outcome(text + SOLVED, layers=(layer,)), found.values())
        passed = [name for name, verdict in zip(found, verdicts, strict=True) if verdict.passed]
    assert passed == []
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_success_is_not_forged():
    for name, program in FORGERIES.items():
        assert not outcome(program).passed, name


def test_hanging_program_is_killed_and_leaves_nothing():
    with ThreadPoolExecutor(len(ENDLESS)) as pool:
        started = time.monotonic()
        verdicts = list(pool.map(lambda text: outcome(text + SOLVED), ENDLESS.values()))
    assert not any(verdict.passed for verdict in verdicts)
    assert time.monotonic() - started < 30
    running = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True).stdout
    children = [line for line in running.splitlines() if line.split()[0] == str(os.getpid())]
    assert not any("confinement.py" in line for line in children)


def test_temporary_folder_exists_and_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = "import tempfile\ndef f(x):\n    with tempfile.TemporaryFile() as file:\n" + (
        "        file.write(b'x' * x)\n    with open('a', 'w') as file:\n"
        "        return file.write('x' * (x + 1))\n"
    )
    for layers in (*((layer,) for layer in LAYERS), LAYERS):
        assert outcome(program, layers=layers).passed
    assert list(tmp_path.iterdir()) == []


CLASSES = """
import asyncio
from dataclasses import dataclass

def same(x, **named):
    return x
def add(xs, table):
    xs.append(1)
    table['a'] = xs
def fail(error):
    raise {'zero': ZeroDivisionError('no'), 'text': UnicodeDecodeError('a', b'', 0, 1, 'b')}[error]
def many():
    yield from range(3)
def apply(function, x):
    return function(x)
def soon(x):
    async def later():
        return x
    return asyncio.run(later())

@dataclass
class Point:
    x: int

class Stack:
    def __init__(self, *items):
        self.items = list(items)
    def push(self, item):
        self.items.append(item)
    def __len__(self):
        return len(self.items)
    def __getitem__(self, index):
        return self.items[index]
    def __str__(self):
        return 'stack'
"""
STATEMENTS = """
xs, table = [], {}; add(xs, table); assert xs == [1] and table == {'a': [1]}
assert list(many()) == [0, 1, 2] and many() != [0, 1, 2]
assert Point(3).x == 3 and Point(3) == Point(3) and Point(3) != Point(4)
assert same(x=3, other=4) == 3
assert apply(lambda x: x + 1, 1) == 2
assert apply(lambda x: same(x) + apply(same, 2), 1) == 3
stack = Stack(1); assert not Stack() and stack; stack.push(2)
assert len(stack) == 2 and stack[1] == 2 and str(stack) == 'stack' and stack.items == [1, 2]
assert soon(3) == 3
""".strip().splitlines()


def test_values_and_calls_cross():
    values = (
        *("None", "True", "2**9000", "-0.0", "1e-320", "float('inf')", "1j", "'é\\ud800'"),
        *("b'\\xff'", "bytearray(b'a')", "[(1, [2]), {3}, frozenset({4})]", "range(3)"),
        *("{(1, 2): {'a': None}}", "Decimal('1.10')", "date(2020, 1, 2)"),
    )
    statements = [f"assert repr(same({value})) == repr({value})" for value in values]
    for kind, error in (("zero", "ZeroDivisionError"), ("text", "UnicodeDecodeError")):
        statements.append(f"try:\n    fail({kind!r}); assert False\nexcept {error}:\n    pass")
    setup = "from datetime import date\nfrom decimal import Decimal"
    tests = {"setup": setup, "tested": [], "statements": [*statements, *STATEMENTS]}
    verdict = outcome(CLASSES, tests)
    assert verdict.passed, verdict.reason


def in_thread_without(calls, action):
    """Return what an action returns in a thread to which the kernel refuses some system calls."""
    pyseccomp = pytest.importorskip("pyseccomp")
    found = []

    def run():
        rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
        for call in calls:
            rules.add_rule(pyseccomp.ERRNO(1), call)
        rules.load()
        found.append(action())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def layers_without(*calls):
    return in_thread_without(calls, available_layers.__wrapped__)


def test_one_layer_is_enough():
    assert layers_without("unshare") == ("landlock",)
    assert layers_without("landlock_create_ruleset") == ("namespaces",)


def test_without_a_layer_no_program_is_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sandbox, "available_layers", available_layers.__wrapped__)
    monkeypatch.setattr(
        "lm.evaluation.code.pass_rates.available_layers", available_layers.__wrapped__
    )
    problem = {"task_id": 1, "prompt": "", "code": "", "test_list": ["assert f(1) == 2"]}
    (tmp_path / "p.jsonl").write_text(json.dumps(problem) + "\n")
    (tmp_path / "s.jsonl").write_text(json.dumps({"task_id": 1, "completion": SOLVED}) + "\n")
    words = ["eval", "--code", str(tmp_path / "p.jsonl"), "--samples", str(tmp_path / "s.jsonl")]
    monkeypatch.setattr("lm.parallel.hosts.exit_at_once", lambda code: None)
    calls = ("unshare", "landlock_create_ruleset")
    assert in_thread_without(calls, lambda: main([*words, "--json"])) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: no program was run: this kernel cannot confine programs")
    assert not (tmp_path / "s.jsonl-results" / "report.json").exists()
