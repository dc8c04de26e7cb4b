"""Where the time of a run goes, added up over restarts."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from lm.parallel.hosts import is_lead
from lm.storage import write_atomically

PARTS = ("compile", "data", "step", "eval", "checkpoint", "other")


class Clock:
    """Seconds of each part of a run; whatever no part claims is "other".

    `goodput` is the share of all time, restarts included, in which steps were computed that were
    not computed again after a restart. Time between the end of one process and the start of the
    next is not counted.
    """

    def __init__(self, file: Path, first_step: int):
        self._file = file
        before = json.loads(file.read_text()) if file.exists() else {}
        self._seconds = {part: before.get("seconds", {}).get(part, 0.0) for part in PARTS}
        self._earlier_steps = before.get("steps_computed", 0)
        self._first_step = first_step
        self._starts = before.get("starts", 0) + 1
        self._began = self._last = time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time inside the context counts as `name`."""
        start = time.perf_counter()
        self._seconds["other"] += start - self._last
        try:
            yield
        finally:
            self._last = time.perf_counter()
            self._seconds[name] += self._last - start

    def summary(self, step: int) -> dict:
        """Seconds by part, starts, steps computed (again) and goodput, at `step`."""
        now = time.perf_counter()
        seconds = dict(self._seconds, other=self._seconds["other"] + now - self._last)
        computed = self._earlier_steps + step - self._first_step
        useful = seconds["step"] * (step / computed if computed else 1.0)
        return {
            "seconds": seconds,
            "starts": self._starts,
            "steps_computed": computed,
            "goodput": useful / max(sum(seconds.values()), 1e-9),
        }

    def save(self, step: int) -> None:
        """Write the summary where the next start finds it; the lead process does."""
        if is_lead():
            write_atomically(self._file, json.dumps(self.summary(step), indent=1))
