"""A run that hangs ends with an error instead of silence."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator

TICK_SECONDS = 5.0

Beat = Callable[[str], None]


@contextlib.contextmanager
def watchdog(seconds: float, end: Callable[[int], None] = os._exit) -> Iterator[Beat]:
    """While inside, `beat(what)` must be called at least every `seconds`; 0 watches nothing.

    A collective whose peer never comes blocks the main thread for ever: another thread prints
    what the run was at and calls `end(1)`. It counts its own ticks, so that a machine that slept
    or a process that was stopped does not count as one that hung.
    """
    if not seconds:
        yield lambda what: None
        return
    tick = min(TICK_SECONDS, seconds / 4)
    silent = 0.0
    last = "the start"
    finished = threading.Event()

    def beat(what: str) -> None:
        nonlocal silent, last
        silent, last = 0.0, what

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
        yield beat
    finally:
        finished.set()
        thread.join()
