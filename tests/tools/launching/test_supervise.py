"""Restarts of a run, and their limits."""

from __future__ import annotations

import itertools

import pytest

from lm.tools.launching.processes import ExitStatus
from lm.tools.launching.supervise import RestartPolicy, supervise

QUICK = RestartPolicy(restarts=3, backoff=0.0)


class Attempts:
    """Attempts with given exit codes; the last one repeats."""

    def __init__(self, *codes: int):
        self.codes, self.made = list(codes), 0

    def __call__(self) -> ExitStatus:
        code = self.codes[min(self.made, len(self.codes) - 1)]
        self.made += 1
        return ExitStatus(code, f"process 0 exited with {code}")


def test_supervisor_restarts_until_done(stop):
    attempts = Attempts(1, -9, 0)
    assert supervise(attempts, QUICK, lambda: None, print, stop) == 0
    assert attempts.made == 3


@pytest.mark.parametrize("code", [2, 75])
def test_user_error_and_preemption_are_not_restarted(stop, code):
    attempts = Attempts(code)
    assert supervise(attempts, QUICK, lambda: None, print, stop) == code
    assert attempts.made == 1


def test_supervisor_gives_up_with_the_cause_in_one_line(stop):
    attempts, lines = Attempts(1), []
    assert supervise(attempts, QUICK, lambda: None, lines.append, stop) == 1
    assert attempts.made == 4
    assert lines[-1] == "error: gave up after 3 restarts in a row: process 0 exited with 1"


def test_new_checkpoint_starts_the_count_again(stop):
    attempts = Attempts(*[1] * 9, 0)
    checkpoints = itertools.count()
    assert supervise(attempts, QUICK, lambda: next(checkpoints), print, stop) == 0


def test_pauses_double_up_to_a_minute():
    pauses = [RestartPolicy(backoff=1.0).pause(n) for n in range(1, 9)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def test_stop_request_ends_a_pause_and_ignores_a_crash(stop):
    def asks() -> ExitStatus:
        stop(15, None)
        return ExitStatus(-15, "process 0 was killed by SIGTERM")

    assert supervise(asks, RestartPolicy(), lambda: None, print, stop) == 75

    attempts = Attempts(1)
    stop._asked = False
    assert (
        supervise(attempts, RestartPolicy(3, 60.0), lambda: None, lambda _: stop(15, None), stop)
        == 75
    )
    assert attempts.made == 1
