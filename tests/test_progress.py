"""Progress bars: lines if stderr is not a terminal, and nothing unless requested."""

from __future__ import annotations

import re
import sys
import time

import pytest

import lm.progress
from lm.progress import progress_bar, track


@pytest.mark.parametrize("total", [40, None])
def test_without_a_terminal_a_line_comes_once_a_period_with_rate_and_time(
    total, monkeypatch, capsys
):
    monkeypatch.setattr(lm.progress, "_SECONDS_A_LINE", 0.1)
    start = time.monotonic()
    for _ in track(range(40), total, description="evaluating", unit="batch"):
        time.sleep(0.01)
    periods = (time.monotonic() - start) / 0.1
    out, err = capsys.readouterr()
    assert (out, err.count("\r")) == ("", 0)
    lines = err.splitlines()
    assert 2 <= len(lines) <= periods + 2
    line = (
        r"evaluating: \d+ of 40 \(\d+ %\), *\S+batch/s, \d\d:\d\d left"
        if total
        else r"evaluating: \d+, *\S+batch/s, \d\d:\d\d so far"
    )
    assert all(re.fullmatch(line, shown) for shown in lines), lines


def test_short_work_prints_no_progress(capsys):
    with progress_bar("tokenizing", 3) as bar:
        bar.update(3)
    assert capsys.readouterr() == ("", "")


def test_terminal_has_a_bar_and_what_is_not_shown_prints_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(track(range(3), 3, description="hidden", shown=False))
    assert capsys.readouterr().err == ""
    list(track(range(3), 3, description="evaluating"))
    assert "\revaluating: 100%" in capsys.readouterr().err
