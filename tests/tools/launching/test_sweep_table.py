"""Table of a sweep: plain text in a pipe, redrawn on a terminal."""

from __future__ import annotations

import io
import json

import pytest

from lm.sweeps.sweep import SweepRun
from lm.tools.launching.run_sweep import SweepTable
from lm.tools.launching.scheduler import DONE, FAILED, RUNNING, WAITING, RunStatus


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def statuses(tmp_path) -> list[RunStatus]:
    """Return three runs: one done, one at a tenth of its steps, one that has not started."""
    runs = [SweepRun(name, "x.py", {}, 100, tmp_path, ()) for name in ("a[b]", "bb", "c")]
    for run, step in zip(runs, (100, 10), strict=False):
        run.workdir.mkdir(parents=True)
        row = {"step": step, "loss": 2.5, "seconds_per_step": 1.0, "eval/validation/loss": 3.0}
        (run.workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return [
        RunStatus(run, state) for run, state in zip(runs, (DONE, RUNNING, WAITING), strict=True)
    ]


def test_columns_are_as_wide_as_their_cells(statuses):
    statuses[2].state, statuses[2].reason = FAILED, "error: [red]no such file[/red]"
    lines = str(SweepTable(statuses)).splitlines()
    assert lines[0] == "a[b]  done     100/100  loss 2.5000  validation 3.0000"
    assert lines[1] == "bb    running  10/100   loss 2.5000  validation 3.0000  1 min 30 s left"
    assert lines[2].startswith("c     failed ")
    assert lines[2].endswith("error: [red]no such file[/red]")
    assert lines[3] == "1 done, 1 running, 1 failed"


@pytest.mark.parametrize(("file", "term"), [(io.StringIO, "xterm"), (Terminal, "dumb")])
def test_in_a_pipe_or_on_a_dumb_terminal_each_change_is_a_one_line_error(
    statuses, monkeypatch, file, term
):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = file()
    with SweepTable(statuses, file) as table:
        table.show_changes()
        assert not file.getvalue()
        statuses[1].state = DONE
        table.show_changes()
        table.show_changes()
    assert file.getvalue() == "bb  done  10/100  loss 2.5000  validation 3.0000\n"


def test_on_a_terminal_running_runs_come_first_and_the_table_vanishes(statuses, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    file = Terminal()
    with SweepTable(statuses, file) as table:
        statuses[0].state = FAILED
        table.show_changes()
    drawn = file.getvalue()
    assert drawn.index("bb") < drawn.index("a[b]")
    assert "1 failed, 1 running, 1 waiting" in drawn
    assert "bb    running  10/100   loss 2.5000  va…\n" in drawn  # a narrow one cuts its lines
    assert drawn.endswith("\x1b[2K")  # the last line was erased
