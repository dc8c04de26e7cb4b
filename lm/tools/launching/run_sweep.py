"""`lm sweep`: bring the runs of a sweep file to their end and write their results."""

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
from lm.sweeps.sweep import Sweep, SweepRun, record_runs
from lm.tools.launching.launchers import Launcher
from lm.tools.launching.scheduler import FAILED, RunStatus, Scheduler, run_halving
from lm.tools.launching.sweep_table import SweepTable, write_results
from lm.training.monitor import RESUMABLE, stop_requests

LOCK_SECONDS = 10.0  # the runs of a sweep that was killed have died by then


def run_sweep(
    sweep: Sweep,
    runs: Sequence[SweepRun],
    folder: Path,
    launcher: Launcher,
    parallel: int,
    retries: int,
    poll_seconds: float = 0.5,
) -> int:
    """Run every run of a sweep, or continue them.

    Args:
        sweep: The sweep, for its successive halving.
        runs: Its runs.
        folder: Folder of the sweep.
        launcher: Starts the runs.
        parallel: Most runs at a time.
        retries: Restarts of a run that fails.
        poll_seconds: Pause between polls of the runs.

    Returns:
        The exit code: 0, 75 if asked to stop, 1 if a run failed for good.
    """
    record_runs(runs, folder)
    statuses = [RunStatus(run) for run in runs]
    with stop_requests() as stop, SweepTable(statuses) as table:
        scheduler = Scheduler(launcher, parallel, retries, stop, table.show_changes, poll_seconds)
        scheduler.find(statuses)
        if sweep.halving:
            finished = run_halving(scheduler, statuses, sweep.halving)
        else:
            finished = scheduler.run_all(statuses)
    return conclude(statuses, folder, finished)


def conclude(statuses: Sequence[RunStatus], folder: Path, finished: bool) -> int:
    """Write results.csv, print the table and return the exit code."""
    write_results(statuses, folder / "results.csv")
    print(SweepTable(statuses), file=sys.stderr)
    if not finished:
        print("asked to stop: the same command continues", file=sys.stderr)
        return RESUMABLE
    print(f"results are in {folder / 'results.csv'}", file=sys.stderr)
    return 1 if any(status.state == FAILED for status in statuses) else 0


def dry_run(runs: Sequence[SweepRun], launcher: Launcher, parallel: int) -> None:
    """Print every run and its exact command."""
    for number, run in enumerate(runs):
        print(f"{run.name}: {shlex.join(launcher.command(run, run.words(), number % parallel))}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the lock of a sweep's folder and yield its file descriptor.

    The runs inherit the descriptor, so no other sweep can start a run while one of a sweep that
    was killed is still dying.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(f"another `lm sweep` works in {folder}: wait, or stop it") from None
            time.sleep(0.1)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
