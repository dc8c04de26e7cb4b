"""`lm sweep`: from a sweep file and a folder to finished runs and their results."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lm.errors import UserError
from lm.sweeps import sweep as sweeps
from lm.tools.launching.launchers import Launcher
from lm.tools.launching.scheduler import FAILED, Entry, Scheduler, run_halving
from lm.tools.launching.sweep_table import Table, write_results
from lm.training.preemption import EXIT_CODE, stop_requests

LOCK_SECONDS = 10.0  # what a sweep that was killed had started is gone by then


def run_sweep(
    sweep: sweeps.Sweep,
    runs: list[sweeps.Run],
    folder: Path,
    launcher: Launcher,
    parallel: int,
    retries: int,
    poll_seconds: float = 0.5,
) -> int:
    """Bring every run to its end; 0, 75 if asked to stop, 1 if a run failed for good."""
    sweeps.prepare(runs, folder)
    entries = [Entry(run) for run in runs]
    with stop_requests() as stop:
        table = Table(entries)
        scheduler = Scheduler(launcher, parallel, retries, stop, table.show, poll_seconds)
        scheduler.find(entries)
        if sweep.halving:
            finished = run_halving(scheduler, entries, sweep.halving)
        else:
            finished = scheduler.run_all(entries)
    return conclude(entries, folder, finished)


def conclude(entries: Sequence[Entry], folder: Path, finished: bool) -> int:
    """Write results.csv and the table; the exit code."""
    write_results(entries, folder / "results.csv")
    print("\n".join(Table(entries).lines()), file=sys.stderr)
    if not finished:
        print("asked to stop: the same command continues", file=sys.stderr)
        return EXIT_CODE
    print(f"results are in {folder / 'results.csv'}", file=sys.stderr)
    return 1 if any(entry.state == FAILED for entry in entries) else 0


def dry_run(runs: Sequence[sweeps.Run], launcher: Launcher, parallel: int) -> None:
    """Print every run and its exact command."""
    for number, run in enumerate(runs):
        print(f"{run.name}: {shlex.join(launcher.command(run, run.words(), number % parallel))}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the folder for this sweep alone; the descriptor of the lock, for its runs to hold too.

    So a new sweep cannot start a run while one of a sweep that was killed still dies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                raise UserError(f"another `lm sweep` works in {folder}: wait, or stop it") from None
            time.sleep(0.1)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
