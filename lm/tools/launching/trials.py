"""Adaptive search of a sweep: Optuna proposes each batch of runs from the results of earlier ones.

The trials are stored in study.db of the sweep's folder, which Optuna's dashboard reads too.
Proposals depend only on the seed and the results, so a search that was interrupted proposes the
same runs when it is started again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.errors import missing_package
from lm.sweeps.sweep import Search, Sweep, SweepRun, make_runs, record_runs
from lm.tools.launching.launchers import Launcher
from lm.tools.launching.run_sweep import conclude
from lm.tools.launching.scheduler import DONE, RunStatus, Scheduler, value_at
from lm.tools.launching.sweep_table import SweepTable
from lm.training.monitor import stop_requests


class Trials:
    """Optuna's trials of a search, as runs.

    Args:
        search: The search.
        folder: Folder of the sweep.
        overrides: Overrides of every run.
        options: Further words of every `lm train` command.
        stored: Keep the trials in `folder`/study.db, or else in memory.
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
        self._overrides, self._options = overrides, options
        self._optuna = _import_optuna()
        self._study = self._optuna.create_study(
            storage=f"sqlite:///{folder.resolve()}/study.db" if stored else None,
            study_name="sweep",
            direction="maximize" if search.highest else "minimize",
            load_if_exists=True,
        )

    def ask(self, count: int) -> list[SweepRun]:
        """Return at most `count` runs without a result: those proposed before, then new ones."""
        states = self._optuna.trial.TrialState
        found = self._study.get_trials(deepcopy=False)
        open_trials = [
            self._optuna.trial.Trial(self._study, trial._trial_id)
            for trial in found
            if trial.state == states.RUNNING
        ]
        for number in range(len(found), self.search.trials)[: max(0, count - len(open_trials))]:
            self._study.sampler = self._sampler(number)
            open_trials.append(self._study.ask())
        runs = []
        for trial in open_trials:
            self._study.sampler = self._sampler(trial.number)
            runs.append(self._run(trial.number, self.search.suggest(trial)))
        return runs

    def tell(self, run: SweepRun, value: float | None) -> None:
        """Store the metric of a run that has ended; None or a non-finite value is a failure."""
        state = self._optuna.trial.TrialState
        failed = value is None or not math.isfinite(value)
        number = int(run.name.rpartition("-")[2])
        self._study.tell(number, None if failed else value, state.FAIL if failed else None)

    def ended(self) -> list[SweepRun]:
        """Return the runs of the trials that have a result."""
        fixed = self._optuna.trial.FixedTrial
        return [
            self._run(trial.number, self.search.suggest(fixed(trial.params, trial.number)))
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state.is_finished()
        ]

    def _sampler(self, number: int) -> Any:
        return self._optuna.samplers.TPESampler(seed=self.search.seed + number)

    def _run(self, number: int, overrides: Mapping[str, Any]) -> SweepRun:
        sweep = Sweep(self.search.config, {f"trial-{number:03}": overrides})
        (run,) = make_runs(sweep, self.folder, self._overrides, self._options)
        return run


def run_search(
    trials: Trials, launcher: Launcher, parallel: int, retries: int, poll_seconds: float = 0.5
) -> int:
    """Run the trials in batches of `parallel`, or continue them.

    Args:
        trials: The trials of the search.
        launcher: Starts the runs.
        parallel: Most runs at a time.
        retries: Restarts of a run that fails.
        poll_seconds: Pause between polls of the runs.

    Returns:
        The exit code: 0, 75 if asked to stop, 1 if a run failed for good.
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
    return conclude(ended, trials.folder, finished)


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise missing_package("an adaptive search", "optuna", "sweep") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
