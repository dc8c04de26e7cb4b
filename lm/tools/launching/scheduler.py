"""Scheduler of a sweep: starts runs, a number of them at a time, and retries those that fail."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lm.sweeps.sweep import Halving
from lm.tools.launching.launchers import SAVE_SECONDS, Launcher
from lm.tools.launching.processes import USER_ERROR
from lm.tools.launching.run_status import (
    DONE,
    DROPPED,
    FAILED,
    RUNNING,
    WAITING,
    RunStatus,
    last_error,
    value_at,
)
from lm.training.monitor import RESUMABLE, StopRequest


@dataclass
class Scheduler:
    """Starts and watches runs.

    Attributes:
        launcher: Starts a run on this machine or elsewhere.
        parallel: Most runs at a time.
        retries: Restarts of a run that fails.
        stop: Request to stop.
        show: Called after every poll of the runs.
        poll_seconds: Pause between polls.
    """

    launcher: Launcher
    parallel: int
    retries: int
    stop: StopRequest
    show: Callable[[], None]
    poll_seconds: float = 0.5

    def find(self, statuses: Iterable[RunStatus]) -> None:
        """Recover from earlier starts of the sweep: finished runs, and jobs that still run."""
        for status in statuses:
            if saved := status.saved():
                status.job = self.launcher.find(saved["job"])
                if saved["state"] == DONE:
                    status.state = DONE
                elif status.job:
                    status.state = RUNNING

    def run_all(self, statuses: Sequence[RunStatus], until: int = 0) -> bool:
        """Bring runs to their end, or to a checkpoint at step `until`; False if asked to stop."""
        running = [status for status in statuses if status.state == RUNNING]
        waiting = deque(s for s in statuses if s.state == WAITING and not (0 < until <= s.step))
        slots = list(range(self.parallel))[::-1]
        while running or waiting:
            if self.stop:
                self._stop(running)
                return False
            while waiting and slots and len(running) < self.parallel:
                running.append(self._start(waiting.popleft(), slots.pop(), until))
            for status in list(running):
                assert status.job is not None
                if (code := status.job.poll()) is not None:
                    running.remove(status)
                    slots.extend([status.slot] if status.slot >= 0 else [])
                    self._exited(status, code)
                    if status.state == WAITING and not 0 < until <= status.step:
                        waiting.append(status)
            self.show()
            time.sleep(self.poll_seconds)
        return True

    def _start(self, status: RunStatus, slot: int, until: int) -> RunStatus:
        status.slot, status.started_step = slot, status.step
        status.job = self.launcher.start(status.run, status.run.words(until), slot)
        status.set(RUNNING)
        return status

    def _exited(self, status: RunStatus, code: int) -> None:
        status.job = None
        if code == 0:
            status.set(DONE)
            return
        if code == RESUMABLE and status.step > status.started_step:
            status.set(WAITING)  # preempted, or stopped at the step that it was given
            return
        status.failures += 1
        final = code == USER_ERROR or status.failures > self.retries
        status.set(FAILED if final else WAITING, last_error(status.run.log))

    def _stop(self, running: Sequence[RunStatus]) -> None:
        for status in running:
            assert status.job is not None
            status.job.stop()
        deadline = time.monotonic() + SAVE_SECONDS
        for status in running:
            assert status.job is not None
            while not status.job.note and status.job.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if not status.job.note:
                code = status.job.poll()
                status.job = None
                status.set(DONE if code == 0 else WAITING)


def run_halving(scheduler: Scheduler, statuses: Sequence[RunStatus], halving: Halving) -> bool:
    """Run successive halving; False if asked to stop.

    Values are compared at equal steps, so a sweep that was interrupted drops the same runs.
    """
    alive = list(statuses)
    for rung in halving.rungs(min(status.run.steps for status in statuses)):
        if not scheduler.run_all(alive, rung):
            return False
        alive, dropped = keep_best(alive, halving, rung)
        for status, reason in dropped:
            status.set(DROPPED, reason)
    return scheduler.run_all(alive)


def keep_best(
    statuses: Sequence[RunStatus], halving: Halving, rung: int
) -> tuple[list[RunStatus], list[tuple[RunStatus, str]]]:
    """Split runs at a rung into those that continue and those that are dropped, with the reason.

    Failed runs are in neither list.
    """
    sign = -1 if halving.highest else 1
    alive = [status for status in statuses if status.state != FAILED]
    values = {s.run.name: value_at(s.run.workdir, halving.metric, rung) for s in alive}

    def rank(status: RunStatus) -> tuple[float, str]:
        value = values[status.run.name]
        return (math.inf if value is None else sign * value, status.run.name)

    ranked = sorted(alive, key=rank)
    n = math.ceil(len(ranked) / halving.factor)
    kept = {status.run.name for status in ranked[:n]}
    dropped = [
        (s, f"step {rung}: {halving.metric} {values[s.run.name]} is not among the best {n}")
        for s in ranked[n:]
    ]
    return [status for status in alive if status.run.name in kept], dropped
