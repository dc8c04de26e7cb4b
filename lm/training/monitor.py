"""Monitoring of a training process: stop signals, hang watchdog, goodput clock, metrics."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from lm.parallel.mesh import is_primary_host
from lm.progress import progress_bar, track
from lm.storage import AnyPath, upload_changes, write_atomically

if TYPE_CHECKING:  # imported at run time only if a run uses trackers
    from lm.training.trackers import BackgroundTracker

RESUMABLE = 75  # exit code EX_TEMPFAIL: rerunning the same command resumes the run
TICK_SECONDS = 5.0
CLOCK_PARTS = ("compile", "data", "step", "eval", "checkpoint", "other")

Heartbeat = Callable[[str], None]


class StopRequest:
    """Flag set by a signal handler; true once the process was asked to stop.

    A second Ctrl-C raises KeyboardInterrupt.

    Attributes:
        requested: whether a stop was requested.
        nothing_to_save: returns whether the process can be killed without losing work.
    """

    def __init__(self) -> None:
        self.requested = False
        self.nothing_to_save: Callable[[], bool] = lambda: True

    def __bool__(self) -> bool:
        return self.requested

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@contextlib.contextmanager
def watchdog(
    seconds: float, workdir: AnyPath, end: Callable[[int], None] = os._exit
) -> Iterator[Heartbeat]:
    """Terminate the process with an error if it stops making progress.

    A collective whose peer never arrives blocks the main thread forever, so a second thread
    watches. It counts its own ticks, so time during which the machine slept or the process was
    suspended does not count.

    Args:
        seconds: maximum time between two heartbeats; 0 disables the watchdog.
        workdir: run folder; stacks of all threads are written to its incidents.
        end: called with exit code 1 after printing the message.

    Yields:
        Heartbeat function; call it with a description of the progress made.
    """
    if not seconds:
        yield lambda progress: None
        return
    tick = min(TICK_SECONDS, seconds / 4)
    silent = 0.0
    last = "the start"
    finished = threading.Event()

    def heartbeat(progress: str) -> None:
        nonlocal silent, last
        silent, last = 0.0, progress

    def watch() -> None:
        nonlocal silent
        while not finished.wait(tick):
            silent += tick
            if silent > seconds:
                from lm.runs.incidents import report_stall

                report_stall(workdir, f"no progress for {seconds:g} s since {last}")
                end(1)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield heartbeat
    finally:
        finished.set()
        thread.join()


class Clock:
    """Wall time of a run by category, accumulated over restarts.

    `goodput` is the fraction of total time, restarts included, spent on steps that did not have to
    be repeated. Time not attributed to a category is "other"; time between the end of one process
    and the start of the next is not counted.

    Attributes:
        log_periods: logging period of each start of the run, by its first step.
    """

    def __init__(self, file: Path, first_step: int, log_period: int = 0):
        """Resume the clock in `file` at `first_step`, or start a new one.

        Args:
            file: clock.json of the run.
            first_step: step from which the run continues.
            log_period: logging period of this start, in steps; 0: none.
        """
        self._file, self._first_step = file, first_step
        self._seconds = dict.fromkeys(CLOCK_PARTS, 0.0)
        self._base, self._earlier_steps, self._starts = first_step, 0, 1
        self.log_periods = {first_step: log_period}
        if file.exists():
            from lm.training.earlier import read_clock

            if earlier := read_clock(file, CLOCK_PARTS):
                self._seconds, self._earlier_steps, starts, self._base, periods = earlier
                self._starts = starts + 1
                kept = {step: period for step, period in periods.items() if step < first_step}
                self.log_periods = kept | self.log_periods
        self._last = time.perf_counter()

    @property
    def continues(self) -> bool:
        """True if an earlier start of the run wrote the file."""
        return self._starts > 1

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Attribute the time inside the context to category `name`."""
        start = time.perf_counter()
        self._seconds["other"] += start - self._last
        try:
            yield
        finally:
            self._last = time.perf_counter()
            self._seconds[name] += self._last - start

    def summary(self, step: int) -> dict:
        """Return seconds by category, starts, steps computed (including repeats) and goodput."""
        now = time.perf_counter()
        seconds = dict(self._seconds, other=self._seconds["other"] + now - self._last)
        computed = self._earlier_steps + step - self._first_step
        useful = seconds["step"] * ((step - self._base) / computed if computed else 1.0)
        return {
            "first_step": self._base,
            "seconds": seconds,
            "starts": self._starts,
            "steps_computed": computed,
            "goodput": useful / max(sum(seconds.values()), 1e-9),
            "log_periods": self.log_periods,
        }

    def save(self, step: int) -> None:
        """Write the summary for the next start; primary host only."""
        if is_primary_host():
            write_atomically(self._file, json.dumps(self.summary(step), indent=1))


# --- metrics: metrics.jsonl, TensorBoard events and a progress bar


class MetricsFile:
    """metrics.jsonl: one JSON object per line, each with its step.

    Opening it drops lines after `first_step` (written by a process that died before its next
    checkpoint) and a half-written last line, so each step appears exactly once. Damaged or missing
    lines are reported on stderr; a damaged file is kept as metrics.jsonl.damaged.

    Attributes:
        has_evaluation: whether the file contains an evaluation of `first_step`.
    """

    def __init__(self, file: Path, first_step: int, log_periods: Mapping[int, int] | None = None):
        """Open `file` to continue after `first_step`; `log_periods` as in `Clock`."""
        self.has_evaluation = False
        if first_step or file.exists():
            from lm.training.earlier import keep_good_lines

            last = keep_good_lines(file, first_step, log_periods or {})
            self.has_evaluation = any(b'"eval/validation/' in line for line in last)
        self._stream = file.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line; non-finite values become null."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._stream.write(json.dumps({"step": step, **finite}) + "\n")

    def flush(self) -> None:
        """Flush to the operating system, so that lines survive the death of this process."""
        self._stream.flush()

    def sync(self) -> None:
        """Flush to disk, so that lines survive a power failure."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class MetricsWriter:
    """Writer of metrics to file, trackers and progress bar; does nothing on other hosts."""

    def __init__(
        self,
        workdir: Path,
        first_step: int,
        config: ConfigDict,
        *,
        log_periods: Mapping[int, int],
        progress: bool,
    ):
        """Open the files of a run.

        Args:
            workdir: folder of the run.
            first_step: step from which the run continues.
            config: configuration with the trackers.
            log_periods: as in `Clock`.
            progress: show a progress bar on stderr.
        """
        self._silent = not is_primary_host()
        if self._silent:
            return
        log = config.log
        self._file = MetricsFile(workdir / "metrics.jsonl", first_step, log_periods)
        self._trackers: list[BackgroundTracker] = []
        if log.tensorboard or log.trackers:
            from lm.training.trackers import open_trackers

            self._trackers = open_trackers(workdir, first_step, config)
        options = {"initial": first_step, "unit": "step"}
        self._bar = progress_bar("training", config.train.steps, shown=progress, **options)

    @property
    def has_evaluation(self) -> bool:
        """True if the evaluation of the first step is written, or this host writes nothing."""
        return self._silent or self._file.has_evaluation

    def step(self, step: int, values: Mapping[str, float], written: bool) -> None:
        """Show the metrics of a training step; also log them if `written`."""
        if self._silent:
            return
        if written:
            self.write(step, values)
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix(
            loss=f"{values['loss']:.4f}",
            tok_s=f"{values['tokens_per_second']:,.0f}",
            refresh=False,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics of a training step or an evaluation."""
        if self._silent:
            return
        self._file.write(step, values)
        for tracker in self._trackers:
            tracker.write(step, values)

    def track(self, items: Iterable, total: int, description: str) -> Iterable:
        """Wrap items in a progress bar, if progress is shown."""
        if self._silent or self._bar.disable:
            return items
        return track(items, total, description=description, leave=False, unit="batch")

    def print_line(self, message: str) -> None:
        """Print a line on stderr without breaking the progress bar."""
        if not self._silent and not self._bar.disable:
            self._bar.write(message, file=sys.stderr)

    def flush(self) -> None:
        """Flush metrics.jsonl."""
        if not self._silent:
            self._file.flush()

    def sync(self) -> None:
        """Sync everything to disk, and upload it if the run is in a bucket."""
        if self._silent:
            return
        self._file.sync()
        for tracker in self._trackers:
            tracker.flush()
        upload_changes()

    def close(self) -> None:
        """Close the files and the progress bar."""
        if self._silent:
            return
        self._bar.close()
        for tracker in self._trackers:
            tracker.close()
        self._file.close()
