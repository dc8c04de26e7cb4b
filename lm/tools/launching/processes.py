"""Groups of child processes that end together, with tagged output; children die with their parent.

`python -m lm.tools.launching.processes PARENT COMMAND …` replaces itself by a command that Linux
kills as soon as the process PARENT dies. A launcher killed by SIGKILL cannot stop its children, and
an orphan would keep writing to a folder that the next start uses. Other systems just run the
command. The parent must start it from its main thread, because the death of the starting thread
counts.
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
from typing import IO, TYPE_CHECKING, BinaryIO, NamedTuple

if TYPE_CHECKING:
    from lm.training.monitor import StopRequest

USER_ERROR = 2  # exit code of a UserError, which a restart would only repeat
POLL_SECONDS = 0.02
KILL_SECONDS = 5.0  # from SIGTERM to SIGKILL after another process of the group failed
LEAVE_SECONDS = 300.0  # from the first exit to the last: a process may still be saving
PR_SET_PDEATHSIG = 1  # prctl(2)
ERROR_LINE = re.compile(r"error:|([A-Za-z_]\w*\.)*[A-Za-z_]\w*(Error|Exception)\b")
_write_lock = threading.Lock()  # keeps lines of different processes from mixing


def die_with_parent(command: Sequence[str]) -> list[str]:
    """Return a command that runs `command` as a child that dies with the calling process."""
    return [sys.executable, "-m", __name__, str(os.getpid()), *command]


def exec_bound_to_parent(parent: int, command: Sequence[str]) -> None:
    """Replace this process by `command`; exit with 1 if `parent` has already died."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        sys.exit(f"error: cannot start {command[0]}: {error.strerror}")


class TaggedOutput:
    """Thread that copies a pipe to a stream, prefixing every line with a tag.

    Carriage returns also end lines, so that progress bars are shown.
    """

    def __init__(self, pipe: IO[bytes], stream: BinaryIO, tag: str):
        self._pipe, self._stream, self._tag = pipe, stream, tag.encode()
        self._last = self._error = ""
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        rest = b""
        while chunk := self._pipe.read1(65536):  # type: ignore[attr-defined]
            *lines, rest = re.split(rb"[\r\n]+", rest + chunk)
            self._write(lines)
        self._write([rest])

    def _write(self, lines: list[bytes]) -> None:
        lines = [line for line in lines if line.strip()]
        for line in lines:
            self._last = line.decode(errors="replace").strip()
            if ERROR_LINE.match(self._last):
                self._error = self._last
        if lines:
            with _write_lock:
                self._stream.write(b"".join(self._tag + line + b"\n" for line in lines))
                self._stream.flush()

    def last_error(self) -> str:
        """Wait for the end of the output; return its last error line, or else its last line."""
        self._thread.join(timeout=2)  # a grandchild may keep the pipe open
        return (self._error or self._last)[:300]


class ExitStatus(NamedTuple):
    """Exit code of a group (0, 75, or the first failure's) and the cause in one line."""

    code: int
    cause: str


class Child(NamedTuple):
    """Process of a group and its output."""

    process: subprocess.Popen
    stdout: TaggedOutput
    stderr: TaggedOutput

    def cause(self, name: str) -> str:
        """Describe how the process ended, in one line."""
        code = self.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        message = self.stderr.last_error() or self.stdout.last_error()
        return f"{name} {how}" + (f" ({message})" if message else "")


def run_group(
    commands: Sequence[Sequence[str]],
    environments: Sequence[Mapping[str, str]],
    stop: StopRequest,
) -> ExitStatus:
    """Run one process per command until all have exited; terminate the others when one fails.

    Output is forwarded with `[index]` before every line.

    Args:
        commands: Command of each process.
        environments: Additional environment variables of each process.
        stop: Stop request, forwarded as SIGTERM.
    """
    children: list[Child] = []
    try:
        for i, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            children.append(_start(command, os.environ | environment, f"[{i}] "))
        return _wait(children, stop)
    finally:
        _end(children, KILL_SECONDS)
        for child in children:  # flush the output before the caller prints more
            child.stdout.last_error()
            child.stderr.last_error()


def _start(command: Sequence[str], environment: Mapping[str, str], tag: str) -> Child:
    process = subprocess.Popen(
        die_with_parent(command),
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    return Child(
        process,
        TaggedOutput(process.stdout, sys.stdout.buffer, tag),
        TaggedOutput(process.stderr, sys.stderr.buffer, tag),
    )


def _wait(children: Sequence[Child], stop: StopRequest) -> ExitStatus:
    from lm.training.monitor import RESUMABLE  # imports JAX, not needed by exec_bound_to_parent

    passed_on = False
    first_exit: float | None = None
    while True:
        codes = [child.process.poll() for child in children]
        exited = {i: code for i, code in enumerate(codes) if code is not None}
        for i, code in exited.items():
            if code not in (0, RESUMABLE):
                return ExitStatus(code, children[i].cause(f"process {i}"))
        if len(exited) == len(codes):
            return ExitStatus(max(exited.values()), "")
        if exited:
            first_exit = first_exit or time.monotonic()
            if time.monotonic() - first_exit > LEAVE_SECONDS:
                late, first = codes.index(None), min(exited)
                return ExitStatus(
                    1, f"process {late} is still running {LEAVE_SECONDS:g} s after process {first}"
                )
        if stop and not passed_on:
            passed_on = True
            for child in children:
                child.process.terminate()
        time.sleep(POLL_SECONDS)


def _end(children: Sequence[Child], seconds: float) -> None:
    for child in children:
        child.process.terminate()  # no effect on a process that has exited
    deadline = time.monotonic() + seconds
    for child in children:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()  # also kills a process stopped by SIGSTOP
            child.process.wait()


if __name__ == "__main__":
    exec_bound_to_parent(int(sys.argv[1]), sys.argv[2:])
