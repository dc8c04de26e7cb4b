"""`lm launch --processes N -- train …`: one run as several supervised processes on this host."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lm.errors import UserError
from lm.runs.incidents import append_incident
from lm.storage import AnyPath, is_committed, is_step, resolve_path
from lm.tools.launching.processes import USER_ERROR, ExitStatus, run_group
from lm.training.monitor import RESUMABLE, StopRequest
from lm.training.stop_signals import stop_requests

LONGEST_PAUSE = 60.0
MULTI_PROCESS_VERBS = ("train", "eval", "generate", "merge")
SET_BY_LAUNCH = ("--coordinator", "--num_processes", "--process_id")


@dataclass(frozen=True)
class RestartPolicy:
    """Limit on consecutive restarts without progress, with exponential backoff.

    Attributes:
        restarts: Maximum number of consecutive restarts.
        backoff: First pause in seconds; doubles each time, up to a minute.
    """

    restarts: int = 10
    backoff: float = 1.0

    def pause(self, failures: int) -> float:
        """Return the pause in seconds after this many consecutive failures (from 1)."""
        return min(self.backoff * 2.0 ** (failures - 1), LONGEST_PAUSE)


def supervise(
    attempt: Callable[[], ExitStatus],
    policy: RestartPolicy,
    progress: Callable[[], Any],
    report: Callable[[str], None],
    stop: StopRequest,
) -> int:
    """Repeat `attempt` until it succeeds, is asked to stop, or fails too often.

    Args:
        attempt: Runs the processes once.
        policy: Number of restarts and pauses between them.
        progress: State of the run, such as its newest checkpoint; a change resets the failure
            count.
        report: Called with one line for each incident.
        stop: Stop request.

    Returns:
        The exit code. 0, 2 and 75 of an attempt are passed through; 1 after too many failures.
    """
    failures = 0
    while True:
        before = progress()
        status = attempt()
        if status.code in (0, RESUMABLE, USER_ERROR):
            if status.code == USER_ERROR:
                report(f"error: {status.cause}; not restarted")
            return status.code
        if stop:
            report(f"asked to stop: {status.cause}; the same command continues")
            return RESUMABLE
        failures = 1 if progress() != before else failures + 1
        if failures > policy.restarts:
            report(f"error: gave up after {policy.restarts} restarts in a row: {status.cause}")
            return 1
        pause = policy.pause(failures)
        report(f"{status.cause}; restart {failures} of {policy.restarts} in {pause:g} s")
        deadline = time.monotonic() + pause
        while time.monotonic() < deadline:
            if stop:
                return RESUMABLE
            time.sleep(0.02)


def launch(words: Sequence[str], n_processes: int, n_gpus: int, policy: RestartPolicy) -> int:
    """Run `lm WORDS…` as several processes until it is done.

    Incidents are also appended to WORKDIR/incidents.jsonl.

    Args:
        words: Command and options.
        n_processes: Number of processes.
        n_gpus: GPUs of this host, split evenly among the processes; 0 leaves their choice to JAX.
        policy: Number of restarts and pauses between them.

    Returns:
        The exit code.
    """
    check_command(words, n_processes, n_gpus)
    workdir = _workdir(words)

    def attempt() -> ExitStatus:
        environments = [gpu_share(i, n_processes, n_gpus) for i in range(n_processes)]
        return run_group(process_commands(words, n_processes, free_port()), environments, stop)

    def report(message: str) -> None:
        record_incident(workdir, message)

    with stop_requests() as stop:
        return supervise(attempt, policy, lambda: newest_checkpoint(workdir), report, stop)


def record_incident(workdir: AnyPath | None, message: str) -> None:
    """Print an incident, and append it to WORKDIR/incidents.jsonl if possible."""
    print(f"launch: {message}", file=sys.stderr, flush=True)
    try:
        if workdir and workdir.is_dir():
            append_incident(workdir, message)
    except Exception as error:  # a full disk or a bucket error: the run continues
        reason = " ".join(str(error).split())
        print(f"launch: incidents.jsonl: {reason}", file=sys.stderr, flush=True)


def check_command(words: Sequence[str], n_processes: int, n_gpus: int) -> None:
    """Raise UserError unless several processes can run the command together."""
    if not words or words[0] not in MULTI_PROCESS_VERBS:
        *verbs, last = MULTI_PROCESS_VERBS
        raise UserError(
            f"lm launch: -- must be followed by {', '.join(verbs)} or {last} with its options, "
            "as in: lm launch --processes 2 -- train --config FILE.py --workdir DIR"
        )
    for word in words:
        if word.partition("=")[0] in SET_BY_LAUNCH:
            raise UserError(f"lm launch sets {word.partition('=')[0]} itself: omit it")
    if n_gpus % n_processes:
        raise UserError(f"--gpus {n_gpus} is not divisible by --processes {n_processes}")


def process_commands(words: Sequence[str], n_processes: int, port: int) -> list[list[str]]:
    """Return the command of every process; process 0 listens on `port`."""
    command = [sys.executable, "-m", "lm", *words]
    if n_processes == 1:
        return [command]
    shared = ["--coordinator", f"127.0.0.1:{port}", "--num_processes", str(n_processes)]
    return [[*command, *shared, "--process_id", str(i)] for i in range(n_processes)]


def gpu_share(process: int, n_processes: int, n_gpus: int) -> dict[str, str]:
    """Return the environment that assigns a process its GPUs; empty if `n_gpus` is 0."""
    if not n_gpus:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(i) for i in range(n_gpus)]
    if len(names) < n_gpus:
        raise UserError(f"--gpus {n_gpus}: CUDA_VISIBLE_DEVICES={visible} names {len(names)}")
    each = n_gpus // n_processes
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[process * each : (process + 1) * each])}


def free_port() -> int:
    """Return an unused TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def newest_checkpoint(workdir: AnyPath | None) -> int | None:
    """Return the step of the newest complete checkpoint, or None."""
    if workdir is None:
        return None
    numbered = (f for f in (workdir / "checkpoints").glob("*") if is_step(f.name))
    return max((int(f.name) for f in numbered if is_committed(f)), default=None)


def _workdir(words: Sequence[str]) -> AnyPath | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--workdir":
            return resolve_path(value if equals else following)
    return None
