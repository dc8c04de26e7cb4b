"""Sweeps: many runs of one experiment, declared in a file with a function `get_sweep`.

from lm.sweeps.sets import grid, named
from lm.sweeps.sweep import Sweep

def get_sweep():
    return Sweep("experiments/stdlib.py:tiny", named(grid({"seed": range(3)})))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from lm import config as configs
from lm.errors import UserError
from lm.storage import read_json, write_atomically
from lm.storage.folder_names import short_name

LONGEST_NAME = 200  # bytes; related file names add up to ten, and the limit is 255


def _require_types(owner: Any, **kinds: Any) -> None:
    """Raise UserError unless the attributes of a declaration have the right types."""
    for name, kind in kinds.items():
        value = getattr(owner, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            shown = getattr(kind, "__name__", str(kind))
            text = f"{type(owner).__name__}: {name} is {type(value).__name__}, not {shown}"
            raise UserError(text)


@dataclass(frozen=True)
class Halving:
    """Successive halving (Jamieson & Talwalkar 2016): only the better runs continue.

    All runs go to step `first`, the best 1/`factor` of them to `factor` times as many steps, and so
    on to the end.

    Attributes:
        first: Step of the first comparison.
        factor: Ratio of runs, and of steps, from one comparison to the next.
        metric: Metric in metrics.jsonl: for "loss" the mean over the last tenth of the steps, for
            others the last value.
        highest: Whether higher is better.
    """

    first: int
    factor: int = 3
    metric: str = "eval/validation/loss"
    highest: bool = False

    def __post_init__(self) -> None:
        _require_types(self, first=Integral, factor=Integral, metric=str)
        for name, low in (("first", 1), ("factor", 2)):
            if getattr(self, name) < low:
                raise UserError(f"Halving: {name}={getattr(self, name)} is below {low}")

    def rungs(self, steps: int) -> list[int]:
        """Return the steps at which runs are compared, all below `steps`."""
        found, step = [], self.first
        while step < steps:
            found.append(step)
            step *= self.factor
        return found


@dataclass(frozen=True)
class Sweep:
    """Runs of one experiment.

    Attributes:
        config: Experiment, FILE.py[:VARIANT].
        runs: Overrides by run name, which is also the folder name (`run_name`).
        halving: Successive halving; None runs everything to the end.
    """

    config: str
    runs: Mapping[str, Mapping[str, Any]]
    halving: Halving | None = None

    def __post_init__(self) -> None:
        _require_types(self, config=str, runs=Mapping, halving=Halving | None)


@dataclass(frozen=True)
class Search:
    """Adaptive search with Optuna: overrides are chosen from the results of earlier runs.

    Attributes:
        config: Experiment, FILE.py[:VARIANT].
        suggest: Returns overrides from an `optuna.Trial`, whose methods, such as
            `trial.suggest_float("lr", 1e-4, 1, log=True)`, propose values.
        trials: Number of runs.
        metric: Metric in metrics.jsonl, taken at the end as in `Halving`.
        highest: Whether to maximize the metric instead of minimizing it.
        seed: Seed of the proposals.
    """

    config: str
    suggest: Callable[[Any], Mapping[str, Any]]
    trials: int
    metric: str = "eval/validation/loss"
    highest: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _require_types(
            self, config=str, suggest=Callable, trials=Integral, metric=str, seed=Integral
        )


@dataclass(frozen=True)
class SweepRun:
    """Run of a sweep.

    Attributes:
        name: Name of the run.
        config: Experiment, FILE.py[:VARIANT].
        overrides: Overrides of configuration keys.
        steps: Training steps.
        folder: Folder of the sweep.
        options: Further words of the `lm train` command.
    """

    name: str
    config: str
    overrides: Mapping[str, str]
    steps: int
    folder: Path
    options: tuple[str, ...]

    @property
    def workdir(self) -> Path:
        """Folder of the run."""
        return self.folder / "runs" / self.name

    @property
    def log(self) -> Path:
        """Output of its processes, over all starts."""
        return self.folder / "logs" / f"{self.name}.log"

    def words(self, stop_at: int = 0) -> list[str]:
        """Return the words of its `lm` command; at step `stop_at` it stops and can be resumed."""
        stop = {"train.stop_at": str(stop_at)} if stop_at else {}
        return [
            "train",
            f"--config={self.config}",
            f"--workdir={self.workdir}",
            *(f"--config.{key}={value}" for key, value in {**self.overrides, **stop}.items()),
            *self.options,
        ]


def load_sweep(
    spec: str, folder: Path, overrides: Mapping[str, str], options: Sequence[str] = ()
) -> tuple[Sweep | Search, list[SweepRun]]:
    """Load a sweep file and validate the configuration of every run.

    Args:
        spec: FILE.py[:VARIANT] of the sweep.
        folder: Folder of the sweep.
        overrides: Overrides of every run; a run's own overrides win.
        options: Further words of every `lm train` command.

    Returns:
        The sweep and its runs. A search has no runs yet.

    Raises:
        UserError: The file declares no sweep, or a configuration is invalid.
    """
    file, _, variant = spec.partition(":")
    sweep = configs.call_file(Path(file), "get_sweep", variant)
    if isinstance(sweep, Search) and sweep.trials > 0:
        experiment, _, of_experiment = sweep.config.partition(":")
        if not experiment.endswith(".json"):  # errors common to all trials end the search
            configs.call_file(Path(experiment), "get_config", of_experiment)
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
) -> Iterator[SweepRun]:
    """Build the runs of a sweep; validate the configuration of each."""
    names: dict[str, Any] = {}
    for given, own in sweep.runs.items():
        name = run_name(given)
        if name in names:
            raise UserError(f"the runs {names[name]!r} and {given!r} would share the folder {name}")
        names[name] = given
        if not isinstance(own, Mapping):
            raise UserError(f"run {name}: its overrides are {type(own).__name__}, not a dictionary")
        overrides = {**common, **{str(key): _text(value) for key, value in own.items()}}
        try:
            config = configs.load_config(sweep.config, overrides)
        except UserError as error:
            raise UserError(f"run {name}: {error}") from None
        yield SweepRun(name, sweep.config, overrides, config.train.steps, folder, options)


def run_name(given: Any) -> str:
    """Return the name of a run, used for its folder and in its commands.

    Names that are safe for both are kept. Others, such as numbers, paths, options or overlong
    names, get safe characters and the start of their digest.
    """
    name = given if isinstance(given, str) else str(given)
    safe = name.isprintable() and not any(c in name for c in "/\\\ufffd")
    if safe and name and name[0] not in ".-" and len(name.encode()) <= LONGEST_NAME:
        return name
    return short_name(name)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def record_runs(runs: Sequence[SweepRun], folder: Path) -> None:
    """Record experiment and overrides of every run in sweep.json of the sweep's folder.

    Raises:
        UserError: A run of the same name was started with other overrides.
    """
    file = folder / "sweep.json"
    now = {run.name: {"config": run.config, "overrides": dict(run.overrides)} for run in runs}
    before: Any = {}
    with suppress(FileNotFoundError):
        before = read_json(file).get("runs")
        if not isinstance(before, dict):
            raise UserError(f"{file}: damaged (it names no runs)")
    for name, was in before.items():
        if now.get(name, was) != was:
            raise UserError(
                f"run {name} of the sweep in {folder} was started with other overrides: "
                "use another --workdir, or give the run another name"
            )
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "status").mkdir(exist_ok=True)
    write_atomically(file, json.dumps({"runs": {**before, **now}}, indent=1))
