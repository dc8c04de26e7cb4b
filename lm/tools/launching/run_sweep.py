"""`lm sweep`: run the runs of a sweep file, show a table, and write results.

The table is live on a terminal; elsewhere each change is a line, and results.csv is written at the
end. In an adaptive search Optuna proposes each batch of runs from the results of earlier ones. Its
trials are stored in study.db of the sweep's folder, which Optuna's dashboard can also read.
Proposals depend only on the seed and the results, so a restarted search proposes the same runs.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lm.errors import UserError, missing_package
from lm.storage import lock, write_atomically
from lm.sweeps.sweep import Search, Sweep, SweepRun, make_runs, record_runs
from lm.tools.formatting import duration, plain_text, text_table
from lm.tools.launching.launchers import Launcher
from lm.tools.launching.scheduler import (
    DONE,
    DROPPED,
    FAILED,
    RUNNING,
    WAITING,
    RunStatus,
    Scheduler,
    last_values,
    run_halving,
    value_at,
)
from lm.training.monitor import RESUMABLE
from lm.training.stop_signals import stop_requests

VALIDATION = "eval/validation/"
LIVE_ORDER = (RUNNING, FAILED, WAITING, DONE, DROPPED)  # row order; short terminals cut the end


class SweepTable:
    """Table of a sweep's runs: live on a terminal; elsewhere state changes are printed as lines.

    Used as a context manager: the live table disappears at the end.
    """

    def __init__(self, statuses: Sequence[RunStatus], file: TextIO | None = None):
        self._statuses, self._file = statuses, file or sys.stderr
        self._start, self._start_fraction = time.monotonic(), self._done_fraction()
        self._printed = {status.run.name: status.state for status in statuses}
        # Not left to rich: in a pipe, FORCE_COLOR must not give a live table.
        console = Console(file=self._file, force_terminal=self._file.isatty())
        self._is_terminal = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(
            console=console, get_renderable=self._live_view, refresh_per_second=1, transient=True
        )

    def __enter__(self) -> SweepTable:
        if self._is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show_changes(self) -> None:
        """Print runs whose state has changed since the last call, if not on a terminal."""
        for status in self._statuses if not self._is_terminal else ():
            if status.state != self._printed[status.run.name]:
                self._printed[status.run.name] = status.state
                line = "  ".join(filter(None, _cells(status)))
                print(line, file=self._file, flush=True)

    def __str__(self) -> str:
        """Return the whole table, one run per line, with a line of totals."""
        return f"{plain_text(text_table(map(_cells, self._statuses)))}\n{self._totals()}"

    def _live_view(self) -> Text:
        ordered = sorted(self._statuses, key=lambda status: LIVE_ORDER.index(status.state))
        table = plain_text(text_table(map(_cells, ordered)))
        return Text(f"{self._totals()}\n{table}", no_wrap=True, overflow="ellipsis")

    def _totals(self) -> str:
        counts = Counter(status.state for status in self._statuses)
        return ", ".join(f"{n} {state}" for state, n in counts.items()) + self._time_left()

    def _time_left(self) -> str:
        """Estimate the remaining time from the steps done; dropped runs count as done."""
        fraction, seconds = self._done_fraction(), time.monotonic() - self._start
        if fraction >= 1 or fraction <= self._start_fraction:
            return ""
        left = (1 - fraction) / (fraction - self._start_fraction) * seconds
        return f"; about {duration(left)} left"

    def _done_fraction(self) -> float:
        def fraction(status: RunStatus) -> float:
            if status.state in (DONE, FAILED, DROPPED):
                return 1.0
            return last_values(status.run.workdir).get("step", 0) / status.run.steps

        return sum(map(fraction, self._statuses)) / len(self._statuses)


def _cells(status: RunStatus) -> tuple[str, ...]:
    """Name, state, steps, loss, validation loss, time left and reason; "" for what is unknown."""
    values = last_values(status.run.workdir)
    step, speed = values.get("step"), values.get("seconds_per_step")
    left = None
    if status.state == RUNNING and speed:
        left = (status.run.steps - values["step"]) * speed
    return (
        status.run.name,
        status.state,
        "" if step is None else f"{step}/{status.run.steps}",
        _labeled("loss", values.get("loss")),
        _labeled("validation", values.get(f"{VALIDATION}loss")),
        "" if left is None else f"{duration(left)} left",
        status.reason[:120],
    )


def _labeled(name: str, value: float | None) -> str:
    return "" if value is None else f"{name} {value:.4f}"


def write_results(statuses: Sequence[RunStatus], file: Path) -> None:
    """Write one CSV row per run: name, state, overrides, step, loss and validation metrics.

    It contains no times, so two sweeps of the same runs give the same file.
    """
    rows: list[dict[str, Any]] = []
    for status in statuses:
        values = last_values(status.run.workdir)
        metrics = {k: v for k, v in values.items() if k == "loss" or k.startswith(VALIDATION)}
        row = {"run": status.run.name, "state": status.state, **status.run.overrides}
        rows.append({**row, "step": values.get("step", 0), **metrics})
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, text.getvalue())


LOCK_SECONDS = 10.0  # by then the runs of a killed sweep have exited


def run_sweep(
    sweep: Sweep,
    runs: Sequence[SweepRun],
    folder: Path,
    launcher: Launcher,
    parallel: int,
    retries: int,
    poll_seconds: float = 0.5,
) -> int:
    """Run every run of a sweep, or continue them.

    Args:
        sweep: The sweep, for its successive halving.
        runs: Its runs.
        folder: Folder of the sweep.
        launcher: Starts the runs.
        parallel: Maximum number of concurrent runs.
        retries: Restarts of a failed run.
        poll_seconds: Pause between polls of the runs.

    Returns:
        The exit code: 0, 75 if asked to stop, 1 if a run failed permanently.
    """
    record_runs(runs, folder)
    statuses = [RunStatus(run) for run in runs]
    with stop_requests() as stop, SweepTable(statuses) as table:
        scheduler = Scheduler(launcher, parallel, retries, stop, table.show_changes, poll_seconds)
        scheduler.find(statuses)
        if sweep.halving:
            finished = run_halving(scheduler, statuses, sweep.halving)
        else:
            finished = scheduler.run_all(statuses)
    return conclude(statuses, folder, finished)


def conclude(statuses: Sequence[RunStatus], folder: Path, finished: bool) -> int:
    """Write results.csv, print the table and return the exit code."""
    write_results(statuses, folder / "results.csv")
    print(SweepTable(statuses), file=sys.stderr)
    if not finished:
        print("asked to stop: the same command continues", file=sys.stderr)
        return RESUMABLE
    print(f"results are in {folder / 'results.csv'}", file=sys.stderr)
    return 1 if any(status.state == FAILED for status in statuses) else 0


def dry_run(runs: Sequence[SweepRun], launcher: Launcher, parallel: int) -> None:
    """Print every run and its exact command."""
    for number, run in enumerate(runs):
        print(f"{run.name}: {shlex.join(launcher.command(run, run.words(), number % parallel))}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the lock of a sweep's folder, and yield its file descriptor.

    The runs inherit the descriptor, so no other sweep can start a run while a run of a killed sweep
    is still exiting.
    """
    problem = f"another `lm sweep` is running in {folder}: wait, or stop it"
    with lock(folder / "lock", problem, LOCK_SECONDS) as descriptor:
        yield descriptor


class Trials:
    """Optuna's trials of a search, as runs.

    Args:
        search: The search.
        folder: Folder of the sweep.
        overrides: Overrides of every run.
        options: Additional words of every `lm train` command.
        stored: Keep the trials in `folder`/study.db, otherwise in memory.
    """

    def __init__(
        self,
        search: Search,
        folder: Path,
        overrides: Mapping[str, str],
        options: tuple[str, ...],
        stored: bool = True,
    ):
        self.search, self.folder = search, folder
        self.rejected: list[RunStatus] = []  # runs with an invalid configuration
        self._overrides, self._options, self._stored = overrides, options, stored
        self._optuna = _import_optuna()
        self._study = self._open_study()

    def _open_study(self) -> Any:
        file = self.folder.resolve() / "study.db"
        try:
            return self._optuna.create_study(
                storage=f"sqlite:///{file}" if self._stored else None,
                study_name="sweep",
                direction="maximize" if self.search.highest else "minimize",
                load_if_exists=True,
            )
        except Exception as error:  # SQLAlchemy's, or Optuna's if it belongs to another search
            problem = str(error).partition("\n")[0]
            raise UserError(
                f"{file}: not a study of this search ({problem}): remove the file, and the search "
                "proposes the same runs again"
            ) from error

    def ask(self, count: int) -> list[SweepRun]:
        """Return at most `count` runs without a result: those proposed earlier, then new ones.

        Proposals that are not valid runs are `rejected`; if all are, others are requested.
        """
        while open_trials := self._open_trials(count):
            runs = []
            for trial in open_trials:
                self._study.sampler = self._sampler(trial.number)
                run, problem = self._try_run(trial.number, trial)
                if problem:
                    self._reject(run, problem)
                else:
                    runs.append(run)
            if runs:
                return runs
        return []

    def _open_trials(self, count: int) -> list[Any]:
        """Return the trials of the first unfinished batch, after requesting missing ones.

        A batch is `count` trials from a multiple of `count`. So no trial is proposed from only part
        of the previous batch's results, wherever the search was killed.
        """
        states = self._optuna.trial.TrialState
        found = self._study.get_trials(deepcopy=False)
        open_trials = [
            self._optuna.trial.Trial(self._study, trial._trial_id)
            for trial in found
            if trial.state == states.RUNNING
        ]
        first = open_trials[0].number if open_trials else len(found)
        end = first // count * count + count
        for number in range(len(found), min(end, self.search.trials)):
            self._study.sampler = self._sampler(number)
            open_trials.append(self._study.ask())
        return open_trials

    def tell(self, run: SweepRun, value: float | None) -> None:
        """Store the metric of a finished run; None or a non-finite value counts as failure."""
        state = self._optuna.trial.TrialState
        failed = value is None or not math.isfinite(value)
        number = trial_number(run)
        self._study.tell(number, None if failed else value, state.FAIL if failed else None)

    def ended(self) -> list[SweepRun]:
        """Return the runs of trials with a result."""
        fixed = self._optuna.trial.FixedTrial
        return [
            self._try_run(trial.number, fixed(trial.params, trial.number))[0]
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state.is_finished()
        ]

    def _sampler(self, number: int) -> Any:
        return self._optuna.samplers.TPESampler(seed=self.search.seed + number)

    def _try_run(self, number: int, trial: Any) -> tuple[SweepRun, str]:
        """Return the run of a trial, and why it is invalid, or ""."""
        name, overrides = f"trial-{number:03}", {}
        try:
            overrides = dict(self.search.suggest(trial))
            sweep = Sweep(self.search.config, {name: overrides})
            (run,) = make_runs(sweep, self.folder, self._overrides, self._options)
        except UserError as error:
            problem = str(error).removeprefix(f"run {name}: ")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # raised by the user's function, possibly an exit
            problem = f"{type(error).__name__}: {error}"
        else:
            return run, ""
        texts = {str(key): str(value) for key, value in overrides.items()}
        own = {**self._overrides, **texts}
        failed = SweepRun(name, self.search.config, own, 1, self.folder, self._options)
        return failed, problem

    def _reject(self, run: SweepRun, problem: str) -> None:
        """Record a trial as failed, because its run cannot be started."""
        status = RunStatus(run)
        if self._stored:
            record_runs([run], self.folder)
            status.set(FAILED, " ".join(problem.split()))
        else:
            status.state, status.reason = FAILED, problem
        self.rejected.append(status)
        self.tell(run, None)


def trial_number(run: SweepRun) -> int:
    """Return the trial number, the suffix of the run's name."""
    return int(run.name.rpartition("-")[2])


def run_search(
    trials: Trials, launcher: Launcher, parallel: int, retries: int, poll_seconds: float = 0.5
) -> int:
    """Run the trials in batches of `parallel`, or continue them.

    Args:
        trials: The trials of the search.
        launcher: Starts the runs.
        parallel: Maximum number of concurrent runs.
        retries: Restarts of a failed run.
        poll_seconds: Pause between polls of the runs.

    Returns:
        The exit code: 0, 75 if asked to stop, 1 if a run failed permanently.
    """
    search, finished = trials.search, True
    ended = [RunStatus.read(run) for run in trials.ended()]
    with stop_requests() as stop:
        while finished and (runs := trials.ask(parallel)):
            record_runs(runs, trials.folder)
            batch = [RunStatus(run) for run in runs]
            with SweepTable([*ended, *batch]) as table:
                show = table.show_changes
                scheduler = Scheduler(launcher, parallel, retries, stop, show, poll_seconds)
                scheduler.find(batch)
                finished = scheduler.run_all(batch)
            for status in batch if finished else ():
                value = value_at(status.run.workdir, search.metric, status.run.steps)
                trials.tell(status.run, value if status.state == DONE else None)
            ended += batch
    ended = sorted([*ended, *trials.rejected], key=lambda status: trial_number(status.run))
    return conclude(ended, trials.folder, finished)


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise missing_package("an adaptive search", "optuna", "sweep") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
