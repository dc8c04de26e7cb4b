"""Starting a group of processes again and again, until it is done or there is no hope."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lm.errors import UserError
from lm.storage import AnyPath, is_whole, locate
from lm.tools.launching.processes import Outcome, run_group
from lm.training.preemption import EXIT_CODE as RESUMABLE
from lm.training.preemption import StopRequest, stop_requests

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


VERBS = ("train", "eval", "generate", "merge")  # those that several processes can run together
OURS = ("--coordinator", "--num_processes", "--process_id")


def launch(words: Sequence[str], processes: int, gpus: int, policy: Policy) -> int:
    """Run `lm WORDS…` as so many processes until it is done; the exit code.

    `gpus` of this host are split evenly among them; 0 leaves their choice to JAX. Incidents are
    also written to WORKDIR/incidents.jsonl.
    """
    check(words, processes, gpus)
    workdir = _workdir(words)

    def attempt() -> Outcome:
        environments = [gpu_share(i, processes, gpus) for i in range(processes)]
        return run_group(commands(words, processes, free_port()), environments, stop)

    def report(message: str) -> None:
        print(f"launch: {message}", file=sys.stderr, flush=True)
        if workdir and workdir.is_dir():
            file = workdir / "incidents.jsonl"
            before = file.read_text() if file.exists() else ""
            line = json.dumps({"time": time.time(), "incident": message})
            file.write_text(f"{before}{line}\n")  # nothing can be appended in a bucket

    with stop_requests() as stop:
        return supervise(attempt, policy, lambda: newest_checkpoint(workdir), report, stop)


def check(words: Sequence[str], processes: int, gpus: int) -> None:
    """Raise UserError if there is nothing, or nothing sensible, to launch."""
    if not words or words[0] not in VERBS:
        raise UserError(
            f"lm launch: after -- comes {', '.join(VERBS[:-1])} or {VERBS[-1]} with its options, "
            "as in: lm launch --processes 2 -- train --config FILE.py --workdir DIR"
        )
    for word in words:
        if word.partition("=")[0] in OURS:
            raise UserError(f"lm launch sets {word.partition('=')[0]} itself: leave it out")
    if gpus % processes:
        raise UserError(f"--gpus {gpus} is not divisible by --processes {processes}")


def commands(words: Sequence[str], processes: int, port: int) -> list[list[str]]:
    """The command of every process; process 0 listens on `port`."""
    command = [sys.executable, "-m", "lm", *words]
    if processes == 1:
        return [command]
    together = ["--coordinator", f"127.0.0.1:{port}", "--num_processes", str(processes)]
    return [[*command, *together, "--process_id", str(i)] for i in range(processes)]


def gpu_share(process: int, processes: int, gpus: int) -> dict[str, str]:
    """The variables that show a process its own GPUs."""
    if not gpus:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(i) for i in range(gpus)]
    if len(names) < gpus:
        raise UserError(f"--gpus {gpus}: CUDA_VISIBLE_DEVICES={visible} names {len(names)}")
    each = gpus // processes
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[process * each : (process + 1) * each])}


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def newest_checkpoint(workdir: AnyPath | None) -> int | None:
    """The step of the newest whole checkpoint, if there is one."""
    if workdir is None:
        return None
    numbered = (f for f in (workdir / "checkpoints").glob("*") if f.name.isdigit())
    return max((int(f.name) for f in numbered if is_whole(f)), default=None)


def _workdir(words: Sequence[str]) -> AnyPath | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--workdir":
            return locate(value if equals else following)
    return None
