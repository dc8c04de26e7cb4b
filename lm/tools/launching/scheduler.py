"""Bringing the runs of a sweep to their ends, so many at a time, whatever happens to them."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lm.storage import write_atomically
from lm.sweeps.sweep import Halving, Run
from lm.tools.launching.launchers import KILL_SECONDS, Job, Launcher
from lm.tools.launching.run_status import last_words, value_at
from lm.tools.launching.supervise import newest_checkpoint
from lm.training.preemption import EXIT_CODE as RESUMABLE
from lm.training.preemption import StopRequest

USER_ERROR = 2  # would only be repeated
WAITING, RUNNING, DONE, FAILED, DROPPED = "waiting", "running", "done", "failed", "dropped"


@dataclass
class Entry:
    """A run and what has become of it; what must survive the sweep is in its status file."""

    run: Run
    state: str = WAITING
    reason: str = ""  # of a failure, or of being dropped
    failures: int = 0
    job: Job | None = None
    slot: int = -1
    started_step: int = field(default=0)

    @property
    def file(self) -> Path:
        return self.run.folder / "status" / f"{self.run.name}.json"

    def set(self, state: str, reason: str = "") -> None:
        self.state, self.reason = state, reason
        note = self.job.note if self.job else ""
        write_atomically(
            self.file, json.dumps({"state": state, "reason": reason, "job": note}, indent=1)
        )

    def as_it_was(self) -> Entry:
        """With the state that an earlier start of the sweep left."""
        before = json.loads(self.file.read_text())
        self.state, self.reason = before["state"], before["reason"]
        return self

    @property
    def step(self) -> int:
        """That of the newest checkpoint."""
        return newest_checkpoint(self.run.workdir) or 0


@dataclass
class Scheduler:
    """Starts, watches and starts again; `show` is called after every look at the runs."""

    launcher: Launcher
    parallel: int
    retries: int
    stop: StopRequest
    show: Callable[[], None]
    poll_seconds: float = 0.5

    def find(self, entries: Iterable[Entry]) -> None:
        """Read what earlier starts of the sweep left: finished runs, jobs that still run."""
        for entry in entries:
            if entry.file.exists():
                before = json.loads(entry.file.read_text())
                entry.job = self.launcher.find(before["job"])
                if before["state"] == DONE:
                    entry.state = DONE
                elif entry.job:
                    entry.state = RUNNING

    def run_all(self, entries: Sequence[Entry], until: int = 0) -> bool:
        """Bring runs to their ends, or to a checkpoint at step `until`; false if asked to stop."""
        running = [entry for entry in entries if entry.state == RUNNING]
        waiting = deque(e for e in entries if e.state == WAITING and not (0 < until <= e.step))
        slots = list(range(self.parallel))[::-1]
        while running or waiting:
            if self.stop:
                self._stop(running)
                return False
            while waiting and slots and len(running) < self.parallel:
                running.append(self._start(waiting.popleft(), slots.pop(), until))
            for entry in list(running):
                assert entry.job is not None
                if (code := entry.job.poll()) is not None:
                    running.remove(entry)
                    slots.extend([entry.slot] if entry.slot >= 0 else [])
                    self._ended(entry, code, until)
                    if entry.state == WAITING and not 0 < until <= entry.step:
                        waiting.append(entry)
            self.show()
            time.sleep(self.poll_seconds)
        return True

    def _start(self, entry: Entry, slot: int, until: int) -> Entry:
        entry.slot, entry.started_step = slot, entry.step
        entry.job = self.launcher.start(entry.run, entry.run.words(until), slot)
        entry.set(RUNNING)
        return entry

    def _ended(self, entry: Entry, code: int, until: int) -> None:
        entry.job = None
        if code == 0:
            entry.set(DONE)
            return
        if code == RESUMABLE and entry.step > entry.started_step:
            entry.set(WAITING)  # it was preempted, or is where it was to stop
            return
        entry.failures += 1
        reason = last_words(entry.run.log)
        final = code == USER_ERROR or entry.failures > self.retries
        entry.set(FAILED if final else WAITING, reason)

    def _stop(self, running: Sequence[Entry]) -> None:
        for entry in running:
            assert entry.job is not None
            entry.job.stop()
        until = time.monotonic() + KILL_SECONDS
        for entry in running:
            assert entry.job is not None
            while not entry.job.note and entry.job.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            if not entry.job.note:
                code = entry.job.poll()
                entry.job = None
                entry.set(DONE if code == 0 else WAITING)


def run_halving(scheduler: Scheduler, entries: Sequence[Entry], halving: Halving) -> bool:
    """Successive halving over the runs; false if asked to stop.

    Compares values at equal steps, so a sweep that was cut and started again drops the same runs.
    """
    alive = list(entries)
    for rung in halving.rungs(min(entry.run.steps for entry in entries)):
        if not scheduler.run_all(alive, rung):
            return False
        alive, dropped = keep_best(alive, halving, rung)
        for entry, reason in dropped:
            entry.set(DROPPED, reason)
    return scheduler.run_all(alive)


def keep_best(
    entries: Sequence[Entry], halving: Halving, rung: int
) -> tuple[list[Entry], list[tuple[Entry, str]]]:
    """The runs that go on from a rung, and the others with the reason; failed ones are neither."""
    sign = -1 if halving.highest else 1
    alive = [entry for entry in entries if entry.state != FAILED]
    values = {e.run.name: value_at(e.run.workdir, halving.metric, rung) for e in alive}

    def rank(entry: Entry) -> tuple[float, str]:
        value = values[entry.run.name]
        return (math.inf if value is None else sign * value, entry.run.name)

    ranked = sorted(alive, key=rank)
    n = math.ceil(len(ranked) / halving.factor)
    kept = {entry.run.name for entry in ranked[:n]}
    dropped = [
        (e, f"step {rung}: {halving.metric} {values[e.run.name]} is not among the best {n}")
        for e in ranked[n:]
    ]
    return [entry for entry in alive if entry.run.name in kept], dropped
