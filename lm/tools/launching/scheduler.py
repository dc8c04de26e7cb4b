"""Scheduler of a sweep: starts runs, a limited number at a time, and retries failed ones.

The status of a run (state, newest metrics, last error) is read from its files.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.errors import UserError
from lm.storage import parse_json, read_json, write_atomically
from lm.sweeps.sweep import Halving, SweepRun
from lm.tools.launching.launchers import SAVE_SECONDS, Job, Launcher
from lm.tools.launching.processes import ERROR_LINE, USER_ERROR
from lm.tools.launching.supervise import newest_checkpoint
from lm.training.monitor import RESUMABLE, StopRequest

WAITING, RUNNING, DONE, FAILED, DROPPED = "waiting", "running", "done", "failed", "dropped"
STATES = (WAITING, RUNNING, DONE, FAILED, DROPPED)
TAIL_BYTES = 65536


@dataclass
class RunStatus:
    """State of a sweep's run; persistent parts are in `status/NAME.json`.

    Attributes:
        run: The run.
        state: WAITING, RUNNING, DONE, FAILED or DROPPED.
        reason: Cause of a failure, or of being dropped.
        failures: Failures during this sweep.
        job: The job that runs it.
        slot: Launcher slot of the job; -1 for a recovered job.
        started_step: Step of the newest checkpoint when the job was started.
    """

    run: SweepRun
    state: str = WAITING
    reason: str = ""
    failures: int = 0
    job: Job | None = None
    slot: int = -1
    started_step: int = 0

    @property
    def file(self) -> Path:
        """Status file."""
        return self.run.folder / "status" / f"{self.run.name}.json"

    def set(self, state: str, reason: str = "") -> None:
        """Change the state and write it to the status file."""
        self.state, self.reason = state, reason
        saved = {"state": state, "reason": reason, "job": self.job.note if self.job else ""}
        write_atomically(self.file, json.dumps(saved, indent=1))

    @classmethod
    def read(cls, run: SweepRun) -> RunStatus:
        """Build the status of a run from the state that an earlier start left."""
        status = cls(run)
        saved = status.saved()
        status.state, status.reason = saved.get("state", WAITING), saved.get("reason", "")
        return status

    def saved(self) -> dict[str, str]:
        """Read `state`, `reason` and `job` of an earlier start; empty if there was none.

        A damaged file counts as missing: restarting a run just continues it, even if it was done.
        """
        with suppress(UserError, FileNotFoundError):
            saved = read_json(self.file)
            if saved.get("state") in STATES and all(type(x) is str for x in saved.values()):
                return {"reason": "", "job": ""} | saved
        return {}

    @property
    def step(self) -> int:
        """Step of the newest checkpoint."""
        return newest_checkpoint(self.run.workdir) or 0


def last_values(workdir: Path) -> dict[str, Any]:
    """Return the newest value of every metric of a run, and `step`; empty before the first."""
    values: dict[str, Any] = {}
    for row in _rows(_tail(workdir / "metrics.jsonl")):
        values |= row
    return values


def value_at(workdir: Path, metric: str, step: int) -> float | None:
    """Return the last value of a metric up to a step; for "loss" the mean of the last tenth."""
    found: list[float] = []
    file = workdir / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    for row in _rows(lines):
        recent = metric != "loss" or row["step"] > 0.9 * step
        if row["step"] <= step and recent and row.get(metric) is not None:
            found.append(row[metric])
    if not found:
        return None
    return sum(found) / len(found) if metric == "loss" else found[-1]


def last_error(log: Path) -> str:
    """Return the last line of a log that reports an error, or else its last line."""
    lines = [line.strip() for text in _tail(log) for line in text.split("\r") if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    return (errors or lines or ["no output"])[-1]


def _rows(lines: Iterable[bytes | str]) -> Iterator[dict[str, Any]]:
    """Parse lines of metrics, skipping truncated or damaged ones."""
    for line in lines:
        with suppress(UserError):
            row = parse_json(line, "metrics")
            if type(row.get("step")) is int and all(
                value is None or type(value) in (int, float) for value in row.values()
            ):
                yield row


def _tail(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL_BYTES))
            return stream.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


@dataclass
class Scheduler:
    """Starts and monitors runs.

    Attributes:
        launcher: Starts a run on this machine or elsewhere.
        parallel: Maximum number of concurrent runs.
        retries: Restarts of a failed run.
        stop: Stop request.
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
        """Run to completion, or to a checkpoint at step `until`; False if asked to stop."""
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
            status.set(WAITING)  # preempted, or stopped at the requested step
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

    Values are compared at equal steps, so a restarted sweep drops the same runs.
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
    """Split runs at a rung into those that continue and those dropped, with the reason.

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
        (s, f"step {rung}: {halving.metric} {values[s.run.name]} is not among the {n} best")
        for s in ranked[n:]
    ]
    return [status for status in alive if status.run.name in kept], dropped
