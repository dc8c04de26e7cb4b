"""Status of a sweep's runs: state, newest metrics, last error; read from their files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.storage import write_atomically
from lm.sweeps.sweep import SweepRun
from lm.tools.launching.launchers import Job
from lm.tools.launching.processes import ERROR_LINE
from lm.tools.launching.supervise import newest_checkpoint

WAITING, RUNNING, DONE, FAILED, DROPPED = "waiting", "running", "done", "failed", "dropped"
TAIL_BYTES = 65536


@dataclass
class RunStatus:
    """Run of a sweep and its state; what has to survive the sweep is in `status/NAME.json`.

    Attributes:
        run: The run.
        state: WAITING, RUNNING, DONE, FAILED or DROPPED.
        reason: Cause of a failure, or of being dropped.
        failures: Failures of this sweep's starts.
        job: The job that runs it.
        slot: The launcher's slot that the job occupies; -1 for a job found again.
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
        """Build the status of a run with the state that an earlier start left."""
        status = cls(run)
        status.state, status.reason = status.saved()["state"], status.saved()["reason"]
        return status

    def saved(self) -> dict[str, str]:
        """Read `state`, `reason` and `job` of an earlier start; empty if there was none."""
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    @property
    def step(self) -> int:
        """Step of the newest checkpoint."""
        return newest_checkpoint(self.run.workdir) or 0


def last_values(workdir: Path) -> dict[str, Any]:
    """Return the newest value of every metric of a run, and `step`; empty before the first."""
    values: dict[str, Any] = {}
    for line in _tail(workdir / "metrics.jsonl"):
        try:
            values.update(json.loads(line))
        except json.JSONDecodeError:  # the first line is cut, or the last is being written
            continue
    return values


def value_at(workdir: Path, metric: str, step: int) -> float | None:
    """Return the last value of a metric up to a step; of "loss" the mean of the last tenth."""
    found: list[float] = []
    for row in _rows(workdir / "metrics.jsonl"):
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


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines(keepends=True) if file.exists() else []:
        if line.endswith("\n"):
            yield json.loads(line)


def _tail(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL_BYTES))
            return stream.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
