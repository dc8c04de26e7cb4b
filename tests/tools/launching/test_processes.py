"""Process groups, with one-line programs in place of training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lm.tools.launching import processes
from lm.tools.launching.processes import run_group


def python(program: str) -> list[str]:
    """Return the command that runs a program."""
    return [sys.executable, "-c", program]


SLEEP = "import time; time.sleep(60)"
RESUMABLE = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('on');"


def run(stop, *programs):
    return run_group([python(p) for p in programs], [{}] * len(programs), stop)


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((75, 75), 75), ((0, 75), 75)])
def test_exit_code_of_a_successful_group_is_passed_through(stop, codes, expected):
    outcome = run(stop, *(f"raise SystemExit({code})" for code in codes))
    assert outcome == (expected, "")


def test_death_of_one_process_ends_the_others_with_its_last_error(stop, tmp_path):
    note = tmp_path / "pid"
    stays = f"import os; open({str(note)!r}, 'w').write(str(os.getpid())); {SLEEP}"
    dies = (
        "import sys, time; time.sleep(.5); print('ValueError: no such thing', file=sys.stderr);"
        "print('more', file=sys.stderr); sys.exit(3)"
    )
    began = time.monotonic()
    outcome = run(stop, stays, dies)
    assert outcome == (3, "process 1 exited with 3 (ValueError: no such thing)")
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_killed_process_is_named_by_its_signal(stop):
    outcome = run(stop, SLEEP, "import os; os.kill(os.getpid(), 9)")
    assert outcome == (-9, "process 1 was killed by SIGKILL")


def test_process_that_ignores_sigterm_or_is_stopped_is_killed(stop, monkeypatch):
    monkeypatch.setattr(processes, "KILL_SECONDS", 0.3)
    deaf = f"import signal; signal.signal(15, signal.SIG_IGN); {SLEEP}"
    stopped = "import os; os.kill(os.getpid(), 19)"
    assert run(stop, deaf, stopped, "import time; time.sleep(.5); 1/0").code == 1


def test_process_that_never_leaves_is_a_failure(stop, monkeypatch):
    monkeypatch.setattr(processes, "LEAVE_SECONDS", 0.3)
    outcome = run(stop, "pass", SLEEP)
    assert outcome == (1, "process 1 is still running 0.3 s after process 0")


def test_request_to_stop_reaches_every_process(stop, capfdbinary):
    timer = threading.Timer(1.0, stop, (signal.SIGTERM, None))
    timer.start()
    assert run(stop, RESUMABLE + SLEEP, RESUMABLE + SLEEP) == (75, "")
    timer.join()


def test_every_line_is_tagged_and_kept_on_its_stream(stop, capfdbinary):
    bar = r"import sys; sys.stderr.write('1%\r2%\r\n'); print('found'); sys.stdout.write('half')"
    run(stop, "print('a\\nb')", bar)
    out, err = capfdbinary.readouterr()
    assert sorted(out.splitlines()) == [b"[0] a", b"[0] b", b"[1] found", b"[1] half"]
    assert err.splitlines() == [b"[1] 1%", b"[1] 2%"]


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_sigkill_of_the_launcher_leaves_no_orphan(tmp_path):
    note = tmp_path / "pid"
    stays = f"import os; open({str(note)!r}, 'w').write(str(os.getpid())); {SLEEP}"
    launcher = (
        "import sys, subprocess, time; from lm.tools.launching.processes import die_with_parent;"
        f"subprocess.Popen(die_with_parent([sys.executable, '-c', {stays!r}])); time.sleep(60)"
    )
    process = subprocess.Popen(python(launcher))
    until = time.monotonic() + 20
    while not (note.exists() and note.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.wait()
    child = int(note.read_text())
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # dead, not yet collected by its new parent
            return
        time.sleep(0.01)
    pytest.fail("the child lives on")


def test_wrapper_of_every_child_does_not_import_jax():
    program = "import sys, lm.tools.launching.processes; sys.exit('jax' in sys.modules)"
    assert subprocess.run(python(program)).returncode == 0
