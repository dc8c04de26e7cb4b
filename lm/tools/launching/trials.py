"""Adaptive search: each batch of runs is chosen by Optuna after the results of the earlier ones.

What was asked and told is in study.db of the sweep's folder, which Optuna's dashboard reads too.
What is asked depends on the seed and the results alone, so a search that was cut and started again
asks the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.errors import UserError
from lm.sweeps.sweep import Run, Search, Sweep, make_runs, prepare
from lm.tools.launching.launchers import Launcher
from lm.tools.launching.run_status import value_at
from lm.tools.launching.run_sweep import conclude
from lm.tools.launching.scheduler import DONE, Entry, Scheduler
from lm.tools.launching.sweep_table import Table
from lm.training.preemption import stop_requests


class Trials:
    """The trials of a search in its folder, as runs; `stored` on disk, or for this process only."""

    def __init__(
        self,
        search: Search,
        folder: Path,
        overrides: Mapping[str, str],
        options: tuple[str, ...],
        stored: bool = True,
    ):
        self.search, self.folder = search, folder
        self._common, self._options = overrides, options
        self._optuna = _import_optuna()
        self._study = self._optuna.create_study(
            storage=f"sqlite:///{folder.resolve()}/study.db" if stored else None,
            study_name="sweep",
            direction="maximize" if search.highest else "minimize",
            load_if_exists=True,
        )

    def ask(self, count: int) -> list[Run]:
        """The runs of up to so many trials without a result: those asked before, and new ones."""
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

    def tell(self, run: Run, value: float | None) -> None:
        """The metric of a run that ended; None, or not finite, if it failed."""
        state = self._optuna.trial.TrialState
        failed = value is None or not math.isfinite(value)
        number = int(run.name.rpartition("-")[2])
        self._study.tell(number, None if failed else value, state.FAIL if failed else None)

    def ended(self) -> list[Run]:
        """The runs of the trials that have a result."""
        fixed = self._optuna.trial.FixedTrial
        return [
            self._run(trial.number, self.search.suggest(fixed(trial.params, trial.number)))
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state.is_finished()
        ]

    def _sampler(self, number: int) -> Any:
        return self._optuna.samplers.TPESampler(seed=self.search.seed + number)

    def _run(self, number: int, overrides: Mapping[str, Any]) -> Run:
        one = Sweep(self.search.config, {f"trial-{number:03}": overrides})
        (run,) = make_runs(one, self.folder, self._common, self._options)
        return run


def run_search(
    trials: Trials, launcher: Launcher, parallel: int, retries: int, poll_seconds: float = 0.5
) -> int:
    """Ask for as many runs as run at a time, bring them to their ends, tell, and so on.

    0, 75 if asked to stop, 1 if a run failed for good.
    """
    search, finished = trials.search, True
    ended = [Entry(run).as_it_was() for run in trials.ended()]
    with stop_requests() as stop:
        while finished and (runs := trials.ask(parallel)):
            prepare(runs, trials.folder)
            batch = [Entry(run) for run in runs]
            table = Table([*ended, *batch])
            scheduler = Scheduler(launcher, parallel, retries, stop, table.show, poll_seconds)
            scheduler.find(batch)
            finished = scheduler.run_all(batch)
            for entry in batch if finished else ():
                value = value_at(entry.run.workdir, search.metric, entry.run.steps)
                trials.tell(entry.run, value if entry.state == DONE else None)
            ended += batch
    return conclude(ended, trials.folder, finished)


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        message = "an adaptive search needs the package `optuna`: pip install 'lm[sweep]'"
        raise UserError(message) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
