"""Sandbox: run the tests of a program in two confined processes (Linux).

`confinement` describes the confinement, `remote_tests` how tests reach the program. All that a
program can do is exhaust its own limits and fail.

No package on PyPI does this: bubblewrap is a system binary without Landlock, and wheels for either
are specific to other projects. For libseccomp there is pyseccomp, which is used here.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory, TemporaryFile
from typing import IO, Any

from lm.errors import UserError, missing_package

LAYERS = ("namespaces", "landlock")
_PACKAGE = Path(__file__).parent
_MOST_REPORT = 2**16  # bytes
_FLAGS = ("-s", "-S", "-P", "-B", "-X", "utf8")
_MOST_FILES = 1000  # maximum files in a temporary folder
_WATCH_SECONDS = 0.1

_PLAIN_CALLS = """
    access alarm arch_prctl brk chdir clock_getres clock_gettime clock_nanosleep close close_range
    dup dup2 dup3 epoll_create1 epoll_ctl epoll_pwait epoll_wait eventfd2 exit exit_group faccessat
    faccessat2 fadvise64 fallocate fchdir fdatasync flock fstat fstatfs fsync ftruncate futex getcpu
    getcwd getdents64 getegid geteuid getgid getgroups getitimer getpgid getpgrp getpid getppid
    getrandom getresgid getresuid getrlimit getrusage getsid gettid gettimeofday getuid
    get_robust_list lseek lstat madvise membarrier mkdir mkdirat mincore mmap mprotect mremap munmap
    nanosleep newfstatat open openat openat2 pause pipe pipe2 poll ppoll pread64 preadv pselect6
    pwrite64 pwritev read readlink readlinkat readv recvfrom rename renameat renameat2
    restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend
    rt_sigtimedwait sched_getaffinity sched_yield select sendfile sendto setitimer set_robust_list
    set_tid_address sigaltstack stat statfs statx symlink symlinkat sysinfo time times umask uname
    unlink unlinkat wait4 waitid write writev
"""
# Allowed second arguments: fcntl F_DUPFD to F_SETLKW and F_DUPFD_CLOEXEC, without signal owners;
# ioctl TCGETS, FIONBIO, FIONCLEX and FIOCLEX; socketpair SOCK_STREAM with its flags, since
# datagrams could be sent to others.
_SECOND = {
    "fcntl": (*range(8), 1030),
    "ioctl": (0x5401, 0x5421, 0x5450, 0x5451),
    "socketpair": (0x1, 0x801, 0x80001, 0x80801),
}


@dataclass(frozen=True)
class Limits:
    """Limits of each of the two processes.

    Attributes:
        seconds: CPU time; three times as much wall time.
        memory: address space in bytes.
        disk: size of each file and of all files in its temporary folder, in bytes.
    """

    seconds: int = 5
    memory: int = 2**30
    disk: int = 2**24


@dataclass(frozen=True)
class Verdict:
    """Test result: whether the tests passed, why not, and the duration."""

    passed: bool
    reason: str
    seconds: float


class NotConfinedError(Exception):
    """Failure to confine a process; the text gives the reason."""


@cache
def available_layers() -> tuple[str, ...]:
    """Return the layers of `LAYERS` that work on this machine, each tried alone.

    Raises:
        UserError: there is none, or system calls cannot be filtered.
    """
    if sys.platform != "linux":
        raise UserError(f"the sandbox for programs needs Linux, not {sys.platform}")
    problems = {}
    for layer in LAYERS:
        try:
            with NamedTemporaryFile() as outside:
                tests = {
                    "setup": "",
                    "tested": (),
                    "statements": [f"assert not opens({outside.name!r})"],
                }
                verdict = run_tests(_PROBE, tests, Limits(), (layer,))
            if not verdict.passed:
                problems[layer] = verdict.reason
        except NotConfinedError as error:
            problems[layer] = str(error)
    if len(problems) == len(LAYERS):
        why = "; ".join(f"{layer}: {problem}" for layer, problem in problems.items())
        raise UserError(f"no program was run: this kernel cannot confine programs ({why})")
    return tuple(layer for layer in LAYERS if layer not in problems)


_PROBE = """
def opens(path):
    try:
        open(path).close()
    except OSError:
        return False
    return True
"""


def run_tests(
    program: str, tests: Mapping[str, Any], limits: Limits, layers: Sequence[str] = ()
) -> Verdict:
    """Run the tests of a program.

    Args:
        program: source of the program.
        tests: input of `remote_tests.run_statements`.
        limits: limits of each of the two processes.
        layers: file-system layers of `LAYERS`; (): all available ones.

    Raises:
        UserError: this kernel cannot confine processes.
        NotConfinedError: one of the processes could not be confined.
    """
    layers = layers or available_layers()
    started = time.monotonic()
    with TemporaryDirectory(prefix="lm-sandbox-") as folder, ExitStack() as processes:
        requests, answers = os.pipe(), os.pipe()
        try:
            served, testing = (
                processes.enter_context(_confined(role, limits, layers, Path(folder, name), pipes))
                for name, role, pipes in (
                    ("program", {"program": program, "tests": None}, (requests[0], answers[1])),
                    ("tests", {"tests": tests}, (answers[0], requests[1])),
                )
            )
        finally:
            for number in (*requests, *answers):
                os.close(number)
        lines = _read_report(testing, folder, limits)
        if isinstance(lines, str):
            return Verdict(False, lines, time.monotonic() - started)
        if not lines:
            raise NotConfinedError(testing.problem())
        report: dict[str, Any] = {"passed": False, "reason": "the tests ended without a report"}
        if len(lines) > 1:
            report = json.loads(lines[1])
        if report.get("unconfined"):
            raise NotConfinedError(served.problem())
        reason = served.end() if report.get("ended") else report.get("reason", "")
        return Verdict(report["passed"], reason, time.monotonic() - started)


@dataclass(frozen=True)
class _Confined:
    """Running process, and the file of its output before confinement."""

    process: subprocess.Popen[bytes]
    errors: IO[bytes]

    def problem(self) -> str:
        """Return the last line of its error output."""
        self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "no error output")

    def end(self) -> str:
        """Describe how it ended by itself."""
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "the program closed its pipes"
        number = -code if code < 0 else code - 128
        if number in (signal.SIGXCPU, signal.SIGKILL):
            return "the program exceeded its time limit"
        if number > 0:
            return f"the program ended: {signal.strsignal(number)}"
        return f"the program exited with code {code}"


@contextmanager
def _confined(
    wanted: dict[str, Any],
    limits: Limits,
    layers: Sequence[str],
    folder: Path,
    ends: tuple[int, int],
) -> Iterator[_Confined]:
    """Start a confined process, and kill it on exit.

    Args:
        wanted: input of `remote_tests`.
        limits: its limits.
        layers: file-system layers.
        folder: temporary folder to create.
        ends: file descriptors that it inherits.
    """
    folder.mkdir()
    wanted = wanted | {
        "script": (_PACKAGE / "remote_tests.py").read_text(encoding="utf-8"),
        "layers": list(layers),
        "system_calls": base64.b64encode(_system_calls()).decode(),
        "readable": _readable(),
        "folder": str(folder),
        "limits": vars(limits),
        "from": ends[0],
        "to": ends[1],
    }
    own = "/tmp" if "namespaces" in layers else str(folder)
    with TemporaryFile() as stdin, TemporaryFile() as errors:
        stdin.write(json.dumps(wanted).encode())
        stdin.seek(0)
        process = subprocess.Popen(
            [os.path.realpath(sys._base_executable), *_FLAGS, str(_PACKAGE / "confinement.py")],  # type: ignore[attr-defined]
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=ends,
            env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TMPDIR": own},
            start_new_session=True,
        )
        with process:
            try:
                yield _Confined(process, errors)
            finally:
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)


def _read_report(testing: _Confined, folder: str, limits: Limits) -> list[bytes] | str:
    """Return the lines that the tests' process writes, or why there are none."""
    pipe = testing.process.stdout
    assert pipe is not None
    read, seconds = b"", 3 * limits.seconds
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([pipe], [], [], min(left, _WATCH_SECONDS))[0]:
            if _is_full(folder, limits.disk):
                return "the program exceeded its disk limit"
        elif part := os.read(pipe.fileno(), _MOST_REPORT):
            read = (read + part)[:_MOST_REPORT]
        else:
            return read.splitlines()
    return f"timed out after {seconds} seconds"


def _is_full(folder: str, most: int) -> bool:
    """Return whether a folder exceeds the bytes or files that a process may write."""
    sizes = (
        os.lstat(os.path.join(where, name)).st_size
        for where, folders, files in os.walk(folder)
        for name in (*folders, *files)
    )
    total = 0
    for number, size in enumerate(sizes):
        total += size
        if total > 2 * most or number > _MOST_FILES:
            return True
    return False


@cache
def _readable() -> list[str]:
    """Return the folders of Python's library and of shared libraries."""
    own = [os.path.realpath(Path(sys.base_prefix, "lib")), sysconfig.get_path("stdlib")]
    found: list[str] = []
    for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", *own):
        inside = any(Path(path).is_relative_to(other) for other in found)
        if os.path.exists(path) and not inside:
            found.append(path)
    return found


@cache
def _system_calls() -> bytes:
    """Return the system-call filter as BPF instructions: only the listed calls are allowed."""
    try:
        import pyseccomp
    except ImportError as error:
        raise missing_package("a sandbox for programs", "pyseccomp", "code") from error
    except (OSError, RuntimeError, TypeError) as error:
        raise UserError("a sandbox for programs needs libseccomp (Debian: libseccomp2)") from error
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
    for name in _PLAIN_CALLS.split():
        rules.add_rule(pyseccomp.ALLOW, name)
    for name, values in _SECOND.items():
        for value in values:
            rules.add_rule(pyseccomp.ALLOW, name, pyseccomp.Arg(1, pyseccomp.EQ, value))
    rules.add_rule(pyseccomp.ALLOW, "prlimit64", pyseccomp.Arg(0, pyseccomp.EQ, 0))
    with TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
