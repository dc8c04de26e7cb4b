"""Sweeps: many runs of one experiment, and the file that says which.

from lm.sweeps.sets import grid, named
from lm.sweeps.sweep import Sweep

def get_sweep():
    return Sweep("experiments/stdlib.py:tiny", named(grid({"seed": range(3)})))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm import config as configs
from lm.config.experiment_file import call_file
from lm.errors import UserError
from lm.storage import write_atomically


@dataclass(frozen=True)
class Halving:
    """Successive halving (Jamieson & Talwalkar 2016): only the better runs go on.

    All runs go to step `first`, the best 1/`factor` of them to `factor` times as many steps, and
    so on to the end. `metric` is of metrics.jsonl; of "loss" the mean over the last tenth counts,
    of others the last value. The lowest is best, or with `highest` the highest.
    """

    first: int
    factor: int = 3
    metric: str = "eval/validation/loss"
    highest: bool = False

    def rungs(self, steps: int) -> list[int]:
        """The steps at which runs are compared, all below `steps`."""
        found, step = [], self.first
        while step < steps:
            found.append(step)
            step *= self.factor
        return found


@dataclass(frozen=True)
class Sweep:
    """Runs of an experiment FILE.py[:VARIANT], each a name and its overrides."""

    config: str
    runs: Mapping[str, Mapping[str, Any]]
    halving: Halving | None = None


@dataclass(frozen=True)
class Search:
    """So many runs of an experiment, each with overrides chosen after the results of earlier ones.

    `suggest` makes overrides of an Optuna trial, as `trial.suggest_float("lr", 1e-4, 1, log=True)`
    gives them. `metric` is of metrics.jsonl, its value at the end counts as in `Halving`.
    """

    config: str
    suggest: Callable[[Any], Mapping[str, Any]]
    trials: int
    metric: str = "eval/validation/loss"
    highest: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """One run of a sweep; `folder` is the sweep's, `options` are more words of `lm train`."""

    name: str
    config: str
    overrides: Mapping[str, str]
    steps: int
    folder: Path
    options: tuple[str, ...]

    @property
    def workdir(self) -> Path:
        return self.folder / "runs" / self.name

    @property
    def log(self) -> Path:
        """What its processes printed, over all starts."""
        return self.folder / "logs" / f"{self.name}.log"

    def words(self, stop_at: int = 0) -> list[str]:
        """The words of its `lm` command; with `stop_at` it stops there, resumable."""
        stop = {"train.stop_at": str(stop_at)} if stop_at else {}
        return [
            "train",
            f"--config={self.config}",
            f"--workdir={self.workdir}",
            *(f"--config.{key}={value}" for key, value in {**self.overrides, **stop}.items()),
            *self.options,
        ]


def load(
    spec: str, folder: Path, overrides: Mapping[str, str], options: Sequence[str] = ()
) -> tuple[Sweep | Search, list[Run]]:
    """The sweep of `FILE.py[:VARIANT]` and its runs, each configuration validated; of a search,
    whose runs are not known yet, none.

    `overrides` and `options` go to every run; the run's own overrides win.
    """
    file, _, variant = spec.partition(":")
    sweep = call_file(Path(file), "get_sweep", variant)
    if isinstance(sweep, Search) and sweep.trials > 0:
        return sweep, []
    if isinstance(sweep, Search):
        raise UserError(f"{file}: the search has no trials")
    if not isinstance(sweep, Sweep):
        raise UserError(f"{file}: get_sweep returned {type(sweep).__name__}, not a Sweep")
    if not sweep.runs:
        raise UserError(f"{file}: the sweep has no runs")
    return sweep, list(make_runs(sweep, folder, overrides, tuple(options)))


def make_runs(
    sweep: Sweep, folder: Path, common: Mapping[str, str], options: tuple[str, ...]
) -> Iterator[Run]:
    """The runs of a sweep in its folder, each configuration validated."""
    for name, own in sweep.runs.items():
        if not name or "/" in name or name.startswith("."):
            raise UserError(f"run {name!r}: a run's name is the name of its folder")
        overrides = {**common, **{key: _text(value) for key, value in own.items()}}
        try:
            config = configs.load(sweep.config, overrides)
        except UserError as error:
            raise UserError(f"run {name}: {error}") from None
        yield Run(name, sweep.config, overrides, config.train.steps, folder, options)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def prepare(runs: list[Run], folder: Path) -> None:
    """Write sweep.json (experiment and overrides of every run), or check it against an earlier."""
    file = folder / "sweep.json"
    now = {run.name: {"config": run.config, "overrides": dict(run.overrides)} for run in runs}
    before = json.loads(file.read_text())["runs"] if file.exists() else {}
    for name, was in before.items():
        if now.get(name, was) != was:
            raise UserError(
                f"run {name} of the sweep in {folder} was started with other overrides: "
                "use another --workdir, or give the run another name"
            )
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "status").mkdir(exist_ok=True)
    write_atomically(file, json.dumps({"runs": {**before, **now}}, indent=1))
