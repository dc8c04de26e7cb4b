"""One run at a time in a workdir."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest
from commands import arguments, finish, losses, together

import lm.storage
from lm.cli import main
from lm.storage import lock, run_lock

HOLD = "import sys, time; from lm.storage import lock; from pathlib import Path\n"
HOLD += "with lock(Path(sys.argv[1]), 'taken'): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def held(tmp_path):
    """A workdir whose lock another process holds, and that process."""
    run = tmp_path / "run"
    words = [sys.executable, "-c", HOLD, run / ".lock"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield run, process
        process.kill()


def test_second_run_is_a_one_line_error_and_writes_nothing(
    held, experiment_file, one_device, capsys
):
    run, process = held
    words = arguments(experiment_file, run, train__steps=2)
    assert main(words) == 2
    assert f"error: another process trains in {run}" in capsys.readouterr().err
    assert os.listdir(run) == [".lock"]
    process.send_signal(signal.SIGKILL)
    assert main(words) == 0
    assert list(losses(run)) == [1, 2]


def test_all_processes_of_a_second_run_end(held, experiment_file):
    run, _ = held
    words = arguments(experiment_file, run, train__steps=2)
    lead, other = finish(*together(words, words), code=2)
    assert f"error: another process trains in {run}" in lead
    assert f"error: process 0 cannot use --workdir {run}" in other
    assert os.listdir(run) == [".lock"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_without_locks_is_reported_and_used(tmp_path, monkeypatch, capsys, code):
    def flock(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lm.storage.fcntl, "flock", flock)
    for problem in ("taken", ""):
        with lock(tmp_path / "lock", problem):
            assert "no file locks" in capsys.readouterr().err


def test_failed_start_leaves_no_folder_but_keeps_a_runs_folder(tmp_path):
    with run_lock(tmp_path / "failed"):
        pass
    assert not (tmp_path / "failed").exists()
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "run"):
        with run_lock(tmp_path / folder):
            (tmp_path / "run").mkdir(exist_ok=True)
            (tmp_path / "run" / "run.json").touch()
    assert (tmp_path / "empty").is_dir()
    assert (tmp_path / "run" / "run.json").exists()
