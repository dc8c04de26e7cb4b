"""Launchers of a sweep's runs: local, SLURM, or one TPU slice per run."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lm.errors import UserError
from lm.sweeps.sweep import SweepRun
from lm.tools.launching.processes import die_with_parent
from lm.tools.launching.supervise import gpu_share

REPOSITORY = Path(__file__).parents[3]
SAVE_SECONDS = 60.0  # time for a stopping run to save its state


class Job(Protocol):
    """Started run."""

    @property
    def note(self) -> str:
        """Identifier by which a later sweep finds the job; "" if it dies with this sweep."""

    def poll(self) -> int | None:
        """Return the exit code; None while the job runs."""

    def stop(self) -> None:
        """Ask the job to save its state and exit, unless it outlives the sweep."""


class Launcher(Protocol):
    """Starts runs. Concurrent runs each have a distinct `slot`, 0 … parallel - 1."""

    def command(self, run: SweepRun, words: Sequence[str], slot: int) -> list[str]:
        """Return the exact command that `start` runs."""

    def start(self, run: SweepRun, words: Sequence[str], slot: int) -> Job:
        """Start a run as `lm WORDS…`; append its output to its log."""

    def find(self, note: str) -> Job | None:
        """Return the job of an earlier sweep, if its state can still be queried."""


@dataclass
class Process:
    """Job that is a child process of the sweep."""

    process: subprocess.Popen
    note: str = ""

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        self.process.terminate()


@dataclass(frozen=True)
class Local:
    """Launcher on this machine; each run gets an equal share of cores and GPUs.

    Attributes:
        parallel: Maximum number of concurrent runs.
        n_gpus: GPUs split among them; 0 leaves the choice to JAX.
        lm: Command of `lm`.
        keep_open: File descriptors that the runs inherit.
    """

    parallel: int
    n_gpus: int = 0
    lm: tuple[str, ...] = (sys.executable, "-m", "lm")
    keep_open: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.n_gpus % self.parallel:
            raise UserError(f"--gpus {self.n_gpus} is not divisible by --parallel {self.parallel}")

    def command(self, run: SweepRun, words: Sequence[str], slot: int) -> list[str]:
        pinned = shutil.which("taskset") and hasattr(os, "sched_getaffinity")
        cores = core_share(sorted(os.sched_getaffinity(0)), slot, self.parallel) if pinned else []
        pin = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
        return [*pin, *self.lm, *words]

    def start(self, run: SweepRun, words: Sequence[str], slot: int) -> Job:
        environment = os.environ | gpu_share(slot, self.parallel, self.n_gpus)
        command = self.command(run, words, slot)
        return _child(command, run, environment, self.keep_open)

    def find(self, note: str) -> None:
        return None


@dataclass(frozen=True)
class Tpu:
    """Launcher with one TPU slice per run: tpu/train.sh creates it, trains and deletes it.

    Attributes:
        options: Options of tpu/train.sh.
        keep_open: File descriptors that the scripts inherit.
    """

    options: tuple[str, ...]
    keep_open: tuple[int, ...] = ()

    def command(self, run: SweepRun, words: Sequence[str], slot: int) -> list[str]:
        script = str(_script("tpu/train.sh"))
        return [script, "--name", slice_name(run.name), *self.options, "--", *words]

    def start(self, run: SweepRun, words: Sequence[str], slot: int) -> Job:
        return _child(self.command(run, words, slot), run, os.environ, self.keep_open)

    def find(self, note: str) -> None:
        return None


def slice_name(run: str) -> str:
    """Return the name of a run's TPU slice: a-z, 0-9 and "-", at most 63 characters.

    A name that loses more than punctuation gets the start of its digest as a suffix.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if len(plain) <= 50 and re.fullmatch(r"[a-z0-9._,=+ -]+", run) and plain:
        return f"lm-{plain}"
    digest = hashlib.sha256(run.encode()).hexdigest()[:8]
    return f"lm-{plain[:41]}-{digest}".replace("--", "-")


@dataclass(frozen=True)
class Slurm:
    """Launcher with one batch job per run; jobs outlive the sweep and are found again.

    Attributes:
        options: Options of sbatch, which submits scripts/train.sbatch.
    """

    options: tuple[str, ...] = ()

    def command(self, run: SweepRun, words: Sequence[str], slot: int) -> list[str]:
        log = str(run.log).replace("%", "%%")  # sbatch would substitute job numbers
        name, log = f"--job-name={run.name}", f"--output={log}"
        script = str(_script("scripts/train.sbatch"))
        return ["sbatch", "--parsable", name, log, *self.options, script, *words]

    def start(self, run: SweepRun, words: Sequence[str], slot: int) -> Job:
        done = subprocess.run(self.command(run, words, slot), capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"sbatch rejected run {run.name}: {done.stderr.strip()}")
        return SlurmJob(done.stdout.strip().partition(";")[0])

    def find(self, note: str) -> Job | None:
        return SlurmJob(note) if note else None


@dataclass(frozen=True)
class SlurmJob:
    """Batch job.

    Attributes:
        note: Job id.
    """

    note: str

    def poll(self) -> int | None:
        words = ["scontrol", "show", "job", "--oneliner", self.note]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode and "Invalid job id" not in done.stderr:
            return None  # the controller is busy or down: poll again
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
        """Do nothing: the next start of the sweep finds the job."""


def make_launcher(
    kind: str, *, parallel: int, n_gpus: int, options: str, keep_open: tuple[int, ...] = ()
) -> Launcher:
    """Build a launcher by name.

    Args:
        kind: "local", "slurm" or "tpu".
        parallel: Maximum number of concurrent runs.
        n_gpus: GPUs of this machine, split among the runs.
        options: Options of sbatch or tpu/train.sh.
        keep_open: File descriptors that child processes inherit.
    """
    try:
        words = tuple(shlex.split(options))
    except ValueError as error:
        problem = str(error).lower()
        raise UserError(f"--launcher_options {options}: invalid shell syntax ({problem})") from None
    if kind == "local":
        if words:
            raise UserError("--launcher_options needs --launcher slurm or tpu")
        return Local(parallel, n_gpus, keep_open=keep_open)
    return Slurm(words) if kind == "slurm" else Tpu(words, keep_open)


def core_share(cores: Sequence[int], slot: int, parallel: int) -> list[int]:
    """Return the cores of a slot: an equal share, or one shared core if there are too few."""
    each = len(cores) // parallel
    return list(cores[slot * each : (slot + 1) * each]) or [cores[slot % len(cores)]]


def _child(
    command: Sequence[str],
    run: SweepRun,
    environment: Mapping[str, str],
    keep_open: tuple[int, ...],
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
        raise UserError(f"{file} does not exist: --launcher slurm and tpu need a checkout")
    return file
