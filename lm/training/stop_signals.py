"""Signals that request a stop: preemption, time limits, Ctrl-C and a lost terminal.

Python runs signal handlers between bytecodes of the main thread, which may be compiling for
minutes. A watcher thread sees every signal at once and exits the process if nothing would be lost.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from lm.training.monitor import RESUMABLE, StopRequest

_ALWAYS = (signal.SIGTERM, signal.SIGINT)
_UNLESS_IGNORED = (signal.SIGHUP, signal.SIGUSR1)  # nohup ignores the first
_ONE_REQUEST_SECONDS = (
    1.0  # a launcher may forward a signal that the whole process group also received
)
_POLL_SECONDS = 0.5


@contextlib.contextmanager
def stop_requests(exits: bool = False) -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGINT, SIGHUP and SIGUSR1 into a stop request inside the context.

    SIGHUP and SIGUSR1 stay ignored if they were ignored before.

    Args:
        exits: allow exiting the process: at the first signal, with exit code 75, if nothing needs
            saving; at a second one in any case. Otherwise a second Ctrl-C raises
            KeyboardInterrupt.

    Yields:
        The stop request.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signals are delivered to the main thread only
        return
    ignored = {n for n in _UNLESS_IGNORED if signal.getsignal(n) is signal.SIG_IGN}
    numbers = [n for n in (*_ALWAYS, *_UNLESS_IGNORED) if n not in ignored]
    with _watcher(request, numbers) if exits else contextlib.nullcontext():
        handler = _ignore if exits else request
        before = {number: signal.signal(number, handler) for number in numbers}
        try:
            yield request
        finally:
            for number, earlier in before.items():
                signal.signal(number, earlier)


def _ignore(number: int, frame: Any) -> None:
    """Ignore a signal, which the watcher thread handles."""


@contextlib.contextmanager
def _watcher(request: StopRequest, numbers: list[signal.Signals]) -> Iterator[None]:
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    before = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(readable, request, numbers), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writable)
        thread.join()
        os.close(readable)


def _watch(readable: int, request: StopRequest, numbers: list[signal.Signals]) -> None:
    """Handle the signal numbers read from a pipe until it is closed."""
    several = jax.distributed.is_initialized()
    asked_at = None
    while True:
        waits = several and not request and request.nothing_to_save()
        if not select.select([readable], [], [], _POLL_SECONDS if waits else None)[0]:
            from lm.parallel.agreement import stop_is_shared

            if stop_is_shared():
                request.requested = True
                _leave(request, several)
            continue
        received = os.read(readable, 64)
        if not received:
            return
        for number in received:
            if number not in numbers:
                continue
            now = time.monotonic()
            if asked_at is None:
                asked_at, request.requested = now, True
                _leave(request, several)
            elif now - asked_at > _ONE_REQUEST_SECONDS:
                _end(128 + number, f"a second signal ({signal.Signals(number).name}): ends at once")


def _leave(request: StopRequest, several: bool) -> None:
    """Exit with the other processes of the run, unless a process has work to save."""
    if not request.nothing_to_save():
        return
    if several:
        from lm.parallel.agreement import all_leave

        if not all_leave():
            return
    _end(RESUMABLE, "asked to stop, with nothing to save: the same command continues")


def _end(code: int, line: str) -> None:
    print(f"\n{line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
