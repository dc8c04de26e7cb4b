"""Stop signals, hang watchdog and goodput clock of a training process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from lm.parallel.mesh import is_primary_host
from lm.storage import write_atomically

RESUMABLE = 75  # exit code EX_TEMPFAIL: the same command, started again, continues the run
TICK_SECONDS = 5.0
CLOCK_PARTS = ("compile", "data", "step", "eval", "checkpoint", "other")

Heartbeat = Callable[[str], None]


class StopRequest:
    """Flag that a signal sets: true once this process was asked to stop.

    A second Ctrl-C raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self._requested = False

    def __bool__(self) -> bool:
        return self._requested

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGTERM (preemption, time limits) and Ctrl-C into a request while the context lasts."""
    request = StopRequest()
    # Python delivers signals to the main thread only; in others there is nothing to catch.
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if is_main else ()
    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def watchdog(seconds: float, end: Callable[[int], None] = os._exit) -> Iterator[Heartbeat]:
    """End the process with an error when it makes no progress.

    A collective whose peer never arrives blocks the main thread forever, so a second thread
    watches. It counts its own ticks: a machine that slept, or a process that was suspended, does
    not count as hanging.

    Args:
        seconds: longest time between two calls of the heartbeat; 0 disables the watchdog.
        end: called with exit code 1 after the message was printed.

    Yields:
        The heartbeat: a function to be called with a description of the progress made.
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
                print(
                    f"error: nothing happened for {seconds:g} s since {last}: a peer or a device "
                    "does not answer (--config.train.stall_seconds); saved checkpoints are intact, "
                    "the same command continues",
                    file=sys.stderr,
                    flush=True,
                )
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
    """Wall time of a run by part, accumulated over restarts.

    `goodput` is the share of the total time, restarts included, spent on steps that did not have
    to be repeated after a restart. Time that no part claims is "other"; time between the end of
    one process and the start of the next is not counted.
    """

    def __init__(self, file: Path, first_step: int):
        """Continue the clock in `file`, if there is one, at `first_step`."""
        self._file = file
        before = json.loads(file.read_text()) if file.exists() else {}
        self._seconds = {part: before.get("seconds", {}).get(part, 0.0) for part in CLOCK_PARTS}
        self._earlier_steps = before.get("steps_computed", 0)
        self._first_step = first_step
        self._starts = before.get("starts", 0) + 1
        self._last = time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside the context as `name`."""
        start = time.perf_counter()
        self._seconds["other"] += start - self._last
        try:
            yield
        finally:
            self._last = time.perf_counter()
            self._seconds[name] += self._last - start

    def summary(self, step: int) -> dict:
        """Return seconds by part, starts, steps computed (repeated ones too) and goodput."""
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
        """Write the summary for the next start; only the lead process writes."""
        if is_primary_host():
            write_atomically(self._file, json.dumps(self.summary(step), indent=1))
