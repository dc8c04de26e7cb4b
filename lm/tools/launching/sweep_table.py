"""Table of a sweep: live on a terminal, one line a change elsewhere, and results.csv at its end."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lm.storage import write_atomically
from lm.tools.formatting import duration, plain_text, text_table
from lm.tools.launching.scheduler import (
    DONE,
    DROPPED,
    FAILED,
    RUNNING,
    WAITING,
    RunStatus,
    last_values,
)

VALIDATION = "eval/validation/"
LIVE_ORDER = (RUNNING, FAILED, WAITING, DONE, DROPPED)  # a short terminal shows the first rows


class SweepTable:
    """Runs of a sweep: redrawn on a terminal; elsewhere each change of a run's state is printed.

    Used as a context manager: the live table vanishes at the end.
    """

    def __init__(self, statuses: Sequence[RunStatus], file: TextIO | None = None):
        self._statuses, self._file = statuses, file or sys.stderr
        self._start, self._start_fraction = time.monotonic(), self._done_fraction()
        self._printed = {status.run.name: status.state for status in statuses}
        # Not by rich's guess: in a pipe, FORCE_COLOR does not turn lines into a live table.
        console = Console(file=self._file, force_terminal=self._file.isatty())
        self._is_terminal = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(
            console=console, get_renderable=self._live_view, refresh_per_second=1, transient=True
        )

    def __enter__(self) -> SweepTable:
        if self._is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show_changes(self) -> None:
        """Print the runs whose state has changed since the last call, if not on a terminal."""
        for status in self._statuses if not self._is_terminal else ():
            if status.state != self._printed[status.run.name]:
                self._printed[status.run.name] = status.state
                line = "  ".join(filter(None, _cells(status)))
                print(line, file=self._file, flush=True)

    def __str__(self) -> str:
        """Return the whole table, one run a line, and a line of totals."""
        return f"{plain_text(text_table(map(_cells, self._statuses)))}\n{self._totals()}"

    def _live_view(self) -> Text:
        ordered = sorted(self._statuses, key=lambda status: LIVE_ORDER.index(status.state))
        table = plain_text(text_table(map(_cells, ordered)))
        return Text(f"{self._totals()}\n{table}", no_wrap=True, overflow="ellipsis")

    def _totals(self) -> str:
        counts = Counter(status.state for status in self._statuses)
        return ", ".join(f"{n} {state}" for state, n in counts.items()) + self._time_left()

    def _time_left(self) -> str:
        """Estimate from the steps done since the start of the sweep; dropped runs are done."""
        fraction, seconds = self._done_fraction(), time.monotonic() - self._start
        if fraction >= 1 or fraction <= self._start_fraction:
            return ""
        left = (1 - fraction) / (fraction - self._start_fraction) * seconds
        return f"; about {duration(left)} left"

    def _done_fraction(self) -> float:
        def fraction(status: RunStatus) -> float:
            if status.state in (DONE, FAILED, DROPPED):
                return 1.0
            return last_values(status.run.workdir).get("step", 0) / status.run.steps

        return sum(map(fraction, self._statuses)) / len(self._statuses)


def _cells(status: RunStatus) -> tuple[str, ...]:
    """Name, state, steps, loss, validation loss, time left and reason; "" for what is unknown."""
    values = last_values(status.run.workdir)
    step, speed = values.get("step"), values.get("seconds_per_step")
    left = None
    if status.state == RUNNING and speed:
        left = (status.run.steps - values["step"]) * speed
    return (
        status.run.name,
        status.state,
        "" if step is None else f"{step}/{status.run.steps}",
        _labelled("loss", values.get("loss")),
        _labelled("validation", values.get(f"{VALIDATION}loss")),
        "" if left is None else f"{duration(left)} left",
        status.reason[:120],
    )


def _labelled(name: str, value: float | None) -> str:
    return "" if value is None else f"{name} {value:.4f}"


def write_results(statuses: Sequence[RunStatus], file: Path) -> None:
    """Write a CSV row a run: name, state, overrides, step, loss and validation metrics.

    There are no times in it: two sweeps of the same runs give the same file.
    """
    rows: list[dict[str, Any]] = []
    for status in statuses:
        values = last_values(status.run.workdir)
        metrics = {k: v for k, v in values.items() if k == "loss" or k.startswith(VALIDATION)}
        row = {"run": status.run.name, "state": status.state, **status.run.overrides}
        rows.append({**row, "step": values.get("step", 0), **metrics})
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, text.getvalue())
