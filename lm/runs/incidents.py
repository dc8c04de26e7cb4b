"""Incidents of a run: WORKDIR/incidents.jsonl, one JSON object per line."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from lm.storage import AnyPath

SECONDS_TO_WRITE = 10.0


def append_incident(workdir: AnyPath, message: str, **details: str) -> None:
    """Append an incident with a timestamp; raises OSError or a bucket's error if not writable."""
    file = workdir / "incidents.jsonl"
    line = json.dumps({"time": time.time(), "incident": message, **details}) + "\n"
    if isinstance(file, Path):  # all processes of a hanging run write at once
        with file.open("a") as stream:
            stream.write(line)
        return
    before = file.read_text() if file.exists() else ""
    file.write_text(before + line)  # bucket objects cannot be appended to


def thread_stacks() -> str:
    """Return the stack of every thread of this process, by thread name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


def report_stall(workdir: AnyPath, what: str) -> None:
    """Print the error of a hanging run, and record the stacks of all threads as an incident."""
    message = (
        f"{what}: a peer or a device does not respond (--config.train.stall_seconds); saved "
        "checkpoints are intact, the same command continues"
    )
    stacks = thread_stacks()
    written = threading.Event()

    def write() -> None:
        with contextlib.suppress(Exception):  # a full disk or a bucket error
            process = f"{socket.gethostname()}, {os.getpid()}"
            append_incident(workdir, message, process=process, stacks=stacks)
            written.set()

    # The disk or bucket may be what hangs.
    threading.Thread(target=write, daemon=True).start()
    if not written.wait(SECONDS_TO_WRITE):
        print(stacks, file=sys.stderr)
    print(f"error: {message}", file=sys.stderr, flush=True)
