"""Where the runs of a sweep run: this machine, SLURM, or each on a TPU slice of its own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lm.errors import UserError
from lm.sweeps.sweep import Run
from lm.tools.launching.processes import die_with_parent
from lm.tools.launching.supervise import gpu_share

REPOSITORY = Path(__file__).parents[3]
KILL_SECONDS = 60.0  # a run that is asked to stop saves its state first


class Job(Protocol):
    """A run that was started."""

    @property
    def note(self) -> str:
        """What a later sweep needs to find it again; empty if it dies with this one."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def stop(self) -> None:
        """Ask it to save its state and end, if it would not go on without the sweep."""


class Launcher(Protocol):
    """Starts runs; `slot` (0 … parallel - 1) is free while it is given to one."""

    def command(self, run: Run, words: Sequence[str], slot: int) -> list[str]:
        """The exact command that `start` runs."""

    def start(self, run: Run, words: Sequence[str], slot: int) -> Job:
        """Start a run as `lm WORDS…`, its output appended to its log."""

    def find(self, note: str) -> Job | None:
        """The job of an earlier sweep, if it can still be asked."""


@dataclass
class Process:
    """A job that is a child of the sweep."""

    process: subprocess.Popen
    note: str = ""

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        self.process.terminate()


@dataclass(frozen=True)
class Local:
    """So many runs at a time on this machine, each with its share of the cores and GPUs."""

    parallel: int
    gpus: int = 0
    lm: tuple[str, ...] = (sys.executable, "-m", "lm")
    keep_open: tuple[int, ...] = ()  # file descriptors that its children hold

    def __post_init__(self) -> None:
        if self.gpus % self.parallel:
            raise UserError(f"--gpus {self.gpus} is not divisible by --parallel {self.parallel}")

    def command(self, run: Run, words: Sequence[str], slot: int) -> list[str]:
        pinned = shutil.which("taskset") and hasattr(os, "sched_getaffinity")
        cores = share(sorted(os.sched_getaffinity(0)), slot, self.parallel) if pinned else []
        pin = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
        return [*pin, *self.lm, *words]

    def start(self, run: Run, words: Sequence[str], slot: int) -> Job:
        environment = os.environ | gpu_share(slot, self.parallel, self.gpus)
        command = self.command(run, words, slot)
        return _child(command, run, environment, self.keep_open)

    def find(self, note: str) -> None:
        return None


@dataclass(frozen=True)
class Tpu:
    """Each run on a slice of its own: tpu/train.sh creates it, trains and deletes it."""

    options: tuple[str, ...]
    keep_open: tuple[int, ...] = ()

    def command(self, run: Run, words: Sequence[str], slot: int) -> list[str]:
        name = "lm-" + re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-")[:50]
        script = str(_script("tpu/train.sh"))
        return [script, "--name", name, *self.options, "--", *words]

    def start(self, run: Run, words: Sequence[str], slot: int) -> Job:
        return _child(self.command(run, words, slot), run, os.environ, self.keep_open)

    def find(self, note: str) -> None:
        return None


@dataclass(frozen=True)
class Slurm:
    """Each run a batch job of scripts/train.sbatch; jobs outlive the sweep, and are found again."""

    options: tuple[str, ...] = field(default=())

    def command(self, run: Run, words: Sequence[str], slot: int) -> list[str]:
        name, log = f"--job-name={run.name}", f"--output={run.log}"
        script = str(_script("scripts/train.sbatch"))
        return ["sbatch", "--parsable", name, log, *self.options, script, *words]

    def start(self, run: Run, words: Sequence[str], slot: int) -> Job:
        done = subprocess.run(self.command(run, words, slot), capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"sbatch refused run {run.name}: {done.stderr.strip()}")
        return SlurmJob(done.stdout.strip().partition(";")[0])

    def find(self, note: str) -> Job | None:
        return SlurmJob(note) if note else None


@dataclass(frozen=True)
class SlurmJob:
    """A batch job, known by its number."""

    note: str

    def poll(self) -> int | None:
        words = ["scontrol", "show", "job", "--oneliner", self.note]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode and "Invalid job id" not in done.stderr:
            return None  # the controller is busy or away: ask again
        shown = dict(re.findall(r"(JobState|ExitCode)=(\S+)", done.stdout))
        match shown.get("JobState"):
            case "COMPLETED":
                return 0
            case "FAILED":
                code, _, number = shown["ExitCode"].partition(":")
                return int(code) or -int(number)
            case None | "CANCELLED" | "TIMEOUT" | "PREEMPTED" | "NODE_FAIL" | "OUT_OF_MEMORY":
                return 1
        return None

    def stop(self) -> None:
        """It goes on: the next start of the sweep finds it."""


LAUNCHERS = ("local", "slurm", "tpu")


def make(kind: str, parallel: int, gpus: int, options: str, keep_open: tuple[int, ...]) -> Launcher:
    """The launcher of that name; `options` are for the script or sbatch that it calls."""
    words = tuple(shlex.split(options))
    if kind == "local":
        if words:
            raise UserError("--launcher_options is for --launcher slurm or tpu")
        return Local(parallel, gpus, keep_open=keep_open)
    return Slurm(words) if kind == "slurm" else Tpu(words, keep_open)


def share(cores: Sequence[int], slot: int, parallel: int) -> list[int]:
    """The cores of a slot: an equal part of them, or one shared if there are too few."""
    each = len(cores) // parallel
    return list(cores[slot * each : (slot + 1) * each]) or [cores[slot % len(cores)]]


def _child(
    command: Sequence[str], run: Run, environment: Mapping[str, str], keep_open: tuple[int, ...]
) -> Process:
    with run.log.open("ab") as log:
        process = subprocess.Popen(
            die_with_parent(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=keep_open,
        )
    return Process(process)


def _script(path: str) -> Path:
    if not (file := REPOSITORY / path).is_file():
        raise UserError(f"{file} is not there: --launcher slurm and tpu need a checkout")
    return file
