"""`python -m lm.tools.launching.processes PARENT COMMAND …`: a command that dies with its parent.

A launcher that is killed outright cannot stop what it started, and an orphan would go on writing
into a folder that the next start believes its own. Linux kills the child instead; elsewhere this
only runs the command. The parent must start it from its main thread, whose death is what counts.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, BinaryIO, NamedTuple

from lm.training.preemption import EXIT_CODE as RESUMABLE
from lm.training.preemption import StopRequest

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent(command: Sequence[str]) -> list[str]:
    """The command that runs `command` as a child that dies with the calling process."""
    return [sys.executable, "-m", __name__, str(os.getpid()), *command]


def main(parent: int, command: Sequence[str]) -> None:
    """Replace this process by `command`, unless `parent` has died already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        sys.exit(f"error: cannot start {command[0]}: {error.strerror}")


ERROR = re.compile(r"error:|([A-Za-z_]\w*\.)*[A-Za-z_]\w*(Error|Exception)\b")
_write = threading.Lock()  # lines of several processes stay whole


class TaggedOutput:
    """Copies a pipe to a stream, every line with a tag, in a thread of its own.

    A carriage return ends a line too, so that progress bars show.
    """

    def __init__(self, pipe: IO[bytes], stream: BinaryIO, tag: str):
        self._pipe, self._stream, self._tag = pipe, stream, tag.encode()
        self._last = self._error = ""
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        part = b""
        while chunk := self._pipe.read1(65536):  # type: ignore[attr-defined]
            *lines, part = re.split(rb"[\r\n]+", part + chunk)
            self._pass_on(lines)
        self._pass_on([part])

    def _pass_on(self, lines: list[bytes]) -> None:
        lines = [line for line in lines if line.strip()]
        for line in lines:
            self._last = line.decode(errors="replace").strip()
            if ERROR.match(self._last):
                self._error = self._last
        if lines:
            with _write:
                self._stream.write(b"".join(self._tag + line + b"\n" for line in lines))
                self._stream.flush()

    def last_words(self) -> str:
        """The last line that reports an error, else the last line; after the process has ended."""
        self._thread.join(timeout=2)  # a grandchild may keep the pipe open
        return (self._error or self._last)[:300]


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


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
