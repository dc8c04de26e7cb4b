"""Worker processes of `multiprocessing`: how they start, and end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lm.errors import UserError


def _end_later(number: int, frame: FrameType | None) -> None:
    time.sleep(1.0)
    os._exit(1)


_OF_GROUP = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # delivered to parent and workers
_QUIET = "ignore::UserWarning:multiprocessing.resource_tracker"
_OF_MAIN = b"\x8c\x08__main__"  # the module name as pickled; a string may match too
_GUARD = re.compile(rb"__name__\s*==|==\s*__name__")


@contextmanager
def starting_workers() -> Iterator[None]:
    """Start worker processes that import quietly until they call `end_with_parent`.

    Signals sent to the whole group do not reach them, and the resource tracker does not warn about
    what it cleans up after a requested stop.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (before, _QUIET)))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_GROUP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        del os.environ["PYTHONWARNINGS"]
        os.environ |= {} if before is None else {"PYTHONWARNINGS": before}


@contextmanager
def starting_workers_for(payload: bytes) -> Iterator[None]:
    """Start worker processes, without importing the main script unless their payload needs it.

    A worker that imports a script without `if __name__ == "__main__":` would run all of it, and
    deadlock on resources that its parent holds.

    Args:
        payload: pickled objects for the workers.

    Raises:
        UserError: the payload refers to such a script.
    """
    main = sys.modules["__main__"]
    given = {name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)}
    if _OF_MAIN in payload:
        file = given.get("__file__")
        if file and Path(file).is_file() and not _GUARD.search(Path(file).read_bytes()):
            raise UserError(
                f"{file}: worker processes import it for its classes and would run it again: "
                'move its top-level code under `if __name__ == "__main__":`, or set data.workers=1'
            )
        with starting_workers():
            yield
        return
    for name in given:
        setattr(main, name, None)
    try:
        with starting_workers():
            yield
    finally:
        for name, value in given.items():
            setattr(main, name, value)


def end_with_parent() -> None:
    """Exit this worker process as soon as its parent is gone.

    A worker waits for tasks on a pipe that other workers keep open, so it would wait forever if the
    parent was killed. Signals to the whole group are left to the parent; SIGTERM, which the parent
    uses to stop workers, exits after a delay.
    """
    for number in _OF_GROUP:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
