"""A sweep for the eye: a live table of its runs, and results.csv."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from lm.storage import write_atomically
from lm.tools.launching.run_status import last_values
from lm.tools.launching.scheduler import DONE, DROPPED, FAILED, RUNNING, Entry

VALIDATION = "eval/validation/"


class Table:
    """Redraws itself on a terminal; elsewhere says each change of a run, once."""

    def __init__(self, entries: Sequence[Entry], stream: TextIO | None = None, period: float = 1.0):
        self._entries, self._stream, self._period = entries, stream or sys.stderr, period
        self._began, self._fraction = time.monotonic(), self._done_fraction()
        self._drawn_at, self._height = -period, 0
        self._said = {entry.run.name: entry.state for entry in entries}

    def show(self) -> None:
        """Draw, or say what changed since the last call."""
        if not self._stream.isatty():
            for entry in self._entries:
                if entry.state != self._said[entry.run.name]:
                    self._said[entry.run.name] = entry.state
                    print(_line(entry, len(entry.run.name)), file=self._stream, flush=True)
        elif time.monotonic() - self._drawn_at >= self._period:
            self._drawn_at = time.monotonic()
            up = f"\x1b[{self._height}F" if self._height else ""
            lines = self.lines()
            self._height = len(lines)
            self._stream.write(up + "".join(f"{line}\x1b[K\n" for line in lines))
            self._stream.flush()

    def lines(self) -> list[str]:
        """The whole table, a run a line, and a line of totals."""
        width = max(len(entry.run.name) for entry in self._entries)
        counts = Counter(entry.state for entry in self._entries)
        total = ", ".join(f"{n} {state}" for state, n in counts.items())
        return [*(_line(entry, width) for entry in self._entries), total + self._eta()]

    def _eta(self) -> str:
        """From the steps done since the sweep was started, dropped runs counted as done."""
        fraction, seconds = self._done_fraction(), time.monotonic() - self._began
        if fraction >= 1 or fraction - self._fraction <= 0:
            return ""
        left = (1 - fraction) / (fraction - self._fraction) * seconds
        return f"; about {_duration(left)} left"

    def _done_fraction(self) -> float:
        def of(entry: Entry) -> float:
            ended = entry.state in (DONE, FAILED, DROPPED)
            return 1.0 if ended else last_values(entry.run.workdir).get("step", 0) / entry.run.steps

        return sum(map(of, self._entries)) / len(self._entries)


def _line(entry: Entry, width: int) -> str:
    values = last_values(entry.run.workdir)
    parts = [f"{entry.run.name:{width}}  {entry.state:7}"]
    if "step" in values:
        parts.append(f"{values['step']}/{entry.run.steps}")
    if values.get("loss") is not None:
        parts.append(f"loss {values['loss']:.4f}")
    if values.get(f"{VALIDATION}loss") is not None:
        parts.append(f"validation {values[f'{VALIDATION}loss']:.4f}")
    if entry.state == RUNNING and values.get("seconds_per_step"):
        left = (entry.run.steps - values["step"]) * values["seconds_per_step"]
        parts.append(f"{_duration(left)} left")
    if entry.reason:
        parts.append(entry.reason[:120])
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def write_results(entries: Sequence[Entry], file: Path) -> None:
    """Name, state, overrides, step, loss and validation figures of every run, as CSV.

    It holds no times: two sweeps of the same runs give the same file.
    """
    rows = []
    for entry in entries:
        values = last_values(entry.run.workdir)
        figures = {k: v for k, v in values.items() if k == "loss" or k.startswith(VALIDATION)}
        step = {"step": values.get("step", 0)}
        rows.append(
            {"run": entry.run.name, "state": entry.state, **entry.run.overrides, **step, **figures}
        )
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, text.getvalue())
