"""A full disk gives one line, and the run can be continued later; trackers never stop it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from commands import arguments, finish, losses
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lm.cli import main
from lm.training import trackers
from lm.training.trackers import BackgroundTracker, TensorBoard

# The error of a file that is too large comes where that of a full disk would.
LIMITED = "import resource, sys; from lm.cli import main\n"
LIMITED += "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)\n"
LIMITED += "sys.exit(main(sys.argv[2:]))"


@pytest.mark.parametrize(("every", "limit"), [(0, 9_000), (6, 40_000)])
def test_metrics_and_checkpoints_that_cannot_be_written_are_one_line_errors(
    experiment_file, undisturbed, tmp_path, one_device, every, limit
):
    words = arguments(experiment_file, tmp_path / "run", checkpoint__every_steps=every)
    limited = subprocess.Popen(
        [sys.executable, "-c", LIMITED, str(limit), *words],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    (output,) = finish(limited, code=2)
    assert "error: the disk of" in output.splitlines()[-1]
    assert "Traceback" not in output
    assert "Exception ignored" not in output
    assert main(words) == 0
    assert losses(tmp_path / "run") == losses(undisturbed)


class Broken:
    """A tracker that fails, or waits, at a step."""

    def __init__(self, step, wait=None):
        self.step, self.wait, self.taken = step, wait, []

    def write(self, step, values):
        if step == self.step and self.wait:
            self.wait.wait()
        elif step == self.step:
            raise OSError(28, "No space left on device")
        self.taken.append(step)

    def flush(self):
        pass

    def close(self):
        self.taken.append("closed")


def test_failing_tracker_is_reported_once(capsys):
    broken = Broken(3)
    tracker = BackgroundTracker("Mine", lambda: broken)
    for step in range(1, 9):
        tracker.write(step, {"loss": 1.0})
        tracker.flush()
    tracker.close()
    assert broken.taken == [1, 2, "closed"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "Mine failed ([Errno 28] No space left on device): training continues" in line


@pytest.mark.parametrize("rows", [2, 1000])
def test_hanging_tracker_is_reported_once(monkeypatch, capsys, rows):
    monkeypatch.setattr(trackers, "_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "_WAITING_ROWS", 100)
    release = threading.Event()
    tracker = BackgroundTracker("Mine", lambda: Broken(1, release))
    began = time.monotonic()
    for step in range(1, rows + 1):
        tracker.write(step, {"loss": 1.0})
    tracker.close()
    assert time.monotonic() - began < 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Mine failed (it")
    release.set()


def test_unopenable_tracker_is_reported(capsys, tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    tracker = BackgroundTracker("TensorBoard", lambda: TensorBoard(tmp_path / "tensorboard", 0))
    tracker.write(1, {"loss": 1.0})
    tracker.close()
    assert "TensorBoard failed ([Errno 17]" in capsys.readouterr().err


def read_events(folder):
    """The events of a folder's files, read by the format of TFRecord."""
    events = []
    for file in sorted(folder.iterdir()):
        rest = file.read_bytes()
        while rest:
            n = int.from_bytes(rest[:8], "little")
            events.append(Event.FromString(rest[12 : 12 + n]))
            rest = rest[16 + n :]
    return events


def test_tensorboard_gets_every_figure_and_forgets_repeated_steps(tmp_path):
    board = TensorBoard(tmp_path, 4)
    board.write(5, {"loss": 2.5, "eval/validation/loss": float("nan")})
    board.close()
    version, start, restart, row = read_events(tmp_path)
    assert version.file_version == start.file_version == "brain.Event:2"
    assert (restart.step, restart.session_log.status) == (5, SessionLog.START)
    assert row.step == 5
    values = {value.tag: value.simple_value for value in row.summary.value}
    assert values["train/loss"] == 2.5
    assert values["eval/validation/loss"] != values["eval/validation/loss"]
