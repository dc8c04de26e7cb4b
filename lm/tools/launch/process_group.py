"""Processes that live and die together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lm.tools.launch.parent_death import die_with_parent
from lm.tools.launch.prefixed_output import TaggedOutput
from lm.training.preemption import EXIT_CODE as RESUMABLE
from lm.training.preemption import StopRequest

POLL_SECONDS = 0.02
KILL_SECONDS = 5.0  # from SIGTERM to SIGKILL, for those whose peer has died
LEAVE_SECONDS = 300.0  # the last process may end so much later than the first (it may be saving)


class Outcome(NamedTuple):
    """How a group ended: 0, 75 or the exit code of the first that failed, and why in one line."""

    code: int
    cause: str


class Member(NamedTuple):
    """One process of a group and what it prints."""

    process: subprocess.Popen
    stdout: TaggedOutput
    stderr: TaggedOutput

    def cause(self, name: str) -> str:
        """In one line how the process ended."""
        code = self.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        words = self.stderr.last_words() or self.stdout.last_words()
        return f"{name} {how}" + (f" ({words})" if words else "")


def run_group(
    commands: Sequence[Sequence[str]],
    environments: Sequence[Mapping[str, str]],
    stop: StopRequest,
) -> Outcome:
    """Run one process a command until all have ended; when one fails, end the others.

    Their output is passed on with `[number]` before every line. `stop` is passed on as SIGTERM.
    """
    members: list[Member] = []
    try:
        for i, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            members.append(_start(command, os.environ | environment, f"[{i}] "))
        return _wait(members, stop)
    finally:
        _end(members, KILL_SECONDS)
        for member in members:  # all of it is passed on before what follows is said
            member.stdout.last_words()
            member.stderr.last_words()


def _start(command: Sequence[str], environment: Mapping[str, str], tag: str) -> Member:
    process = subprocess.Popen(
        die_with_parent(command),
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    return Member(
        process,
        TaggedOutput(process.stdout, sys.stdout.buffer, tag),
        TaggedOutput(process.stderr, sys.stderr.buffer, tag),
    )


def _wait(members: Sequence[Member], stop: StopRequest) -> Outcome:
    passed_on = False
    first_left: float | None = None
    while True:
        codes = [member.process.poll() for member in members]
        ended = {i: code for i, code in enumerate(codes) if code is not None}
        for i, code in ended.items():
            if code not in (0, RESUMABLE):
                return Outcome(code, members[i].cause(f"process {i}"))
        if len(ended) == len(codes):
            return Outcome(max(ended.values()), "")
        if ended:
            first_left = first_left or time.monotonic()
            if time.monotonic() - first_left > LEAVE_SECONDS:
                late, gone = codes.index(None), min(ended)
                return Outcome(
                    1, f"process {late} still runs {LEAVE_SECONDS:g} s after process {gone}"
                )
        if stop and not passed_on:
            passed_on = True
            for member in members:
                member.process.terminate()
        time.sleep(POLL_SECONDS)


def _end(members: Sequence[Member], seconds: float) -> None:
    for member in members:
        member.process.terminate()  # of a process that has ended: nothing
    until = time.monotonic() + seconds
    for member in members:
        try:
            member.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            member.process.kill()  # stopped processes too
            member.process.wait()
