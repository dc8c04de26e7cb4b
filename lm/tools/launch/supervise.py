"""Starting a group of processes again and again, until it is done or there is no hope."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lm.tools.launch.process_group import Outcome
from lm.training.preemption import EXIT_CODE as RESUMABLE
from lm.training.preemption import StopRequest

USER_ERROR = 2  # would only be repeated
LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Policy:
    """How often to start again: `restarts` in a row without progress, pauses that double.

    `backoff` is the first pause in seconds.
    """

    restarts: int = 10
    backoff: float = 1.0

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row (from 1)."""
        return min(self.backoff * 2.0 ** (failures - 1), LONGEST_PAUSE)


def supervise(
    attempt: Callable[[], Outcome],
    policy: Policy,
    progress: Callable[[], Any],
    report: Callable[[str], None],
    stop: StopRequest,
) -> int:
    """Run `attempt` until it ends well, is asked to stop or fails too often; the exit code.

    0, 2 and 75 pass through. Anything else is started again; when `progress` returns something
    new (a later checkpoint), the count of failures begins anew. `report` gets a line an incident.
    """
    failures = 0
    while True:
        before = progress()
        outcome = attempt()
        if outcome.code in (0, RESUMABLE, USER_ERROR):
            if outcome.code == USER_ERROR:
                report(f"error: {outcome.cause}; not started again")
            return outcome.code
        if stop:
            report(f"asked to stop: {outcome.cause}; the same command continues")
            return RESUMABLE
        failures = 1 if progress() != before else failures + 1
        if failures > policy.restarts:
            report(f"error: gave up after {policy.restarts} restarts in a row: {outcome.cause}")
            return 1
        pause = policy.pause(failures)
        report(f"{outcome.cause}; restart {failures} of {policy.restarts} in {pause:g} s")
        until = time.monotonic() + pause
        while time.monotonic() < until:
            if stop:
                return RESUMABLE
            time.sleep(0.02)
