"""What the folder of a run says of it: configuration, metrics by step, clock, size, samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import config as configs
from lm.accounting.flops import model_flops_per_token, tokens_per_row
from lm.accounting.parameter_counts import count_parameters
from lm.errors import UserError
from lm.experiment import build
from lm.runs.workdir import RUN_FILE, load_config

VALIDATION_LOSS = "eval/validation/loss"
TRAIN_LOSS = "loss"


@dataclass(frozen=True)
class Curve:
    """A metric over the steps at which it was written; not finite is NaN."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        return float(self.values[-1])


@dataclass(frozen=True)
class Run:
    """One run. `size` is None where its configuration cannot be built; `problem` says why."""

    name: str
    config: Mapping[str, Any]
    curves: Mapping[str, Curve]
    clock: Mapping[str, Any] = field(default_factory=dict)
    size: Size | None = None
    problem: str = ""
    samples: Mapping[str, list[dict]] = field(default_factory=dict)
    scores: Mapping[str, dict] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        return int(self.curves[TRAIN_LOSS].steps[-1]) if TRAIN_LOSS in self.curves else 0

    @property
    def finished(self) -> bool:
        return self.last_step >= self.config["train.steps"]

    @property
    def tokens(self) -> int | None:
        return self.last_step * self.size.tokens_per_step if self.size else None

    @property
    def flops(self) -> float | None:
        return self.last_step * self.size.flops_per_step if self.size else None

    @property
    def total_seconds(self) -> float:
        """Seconds of all parts of all starts; 0 where there is no clock."""
        return sum(self.clock.get("seconds", {}).values())

    @property
    def evaluations(self) -> list[str]:
        return [name for name in self.curves if name.startswith("eval/")]

    def final(self, metric: str) -> float | None:
        """The last value of a metric; of the noisy training loss, the mean of its last 5 %."""
        curve = self.curves.get(metric)
        if curve is None:
            return None
        tail = max(1, len(curve.values) // 20) if metric == TRAIN_LOSS else 1
        value = float(np.mean(curve.values[-tail:]))
        return value if np.isfinite(value) else None

    def seconds(self) -> np.ndarray:
        """Seconds spent in steps until each training step that was written."""
        curve = self.curves["seconds_per_step"]
        return np.cumsum(np.nan_to_num(curve.values) * np.diff(curve.steps, prepend=0))


def find_runs(workdir: Path, samples: int = 0) -> list[Run]:
    """The run in `workdir`, or those in its subfolders, in the order of their names.

    With `samples`, also that many predictions of each evaluated split. UserError if there is none.
    """
    if (workdir / RUN_FILE).exists():
        return [read_run(workdir, workdir.resolve().name, samples)]
    files = sorted([*workdir.glob(f"*/{RUN_FILE}"), *workdir.glob(f"*/*/{RUN_FILE}")])
    if not files:
        raise UserError(f"no run in {workdir}: neither it nor its subfolders have a {RUN_FILE}")
    folders = [file.parent for file in files]
    return [read_run(folder, str(folder.relative_to(workdir)), samples) for folder in folders]


def read_run(folder: Path, name: str, samples: int = 0) -> Run:
    """Read one run's folder; what it lacks is left empty."""
    try:
        config = dict(configs.flatten(json.loads((folder / RUN_FILE).read_text())["config"]))
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{folder / RUN_FILE} is damaged: {error}") from None
    clock = folder / "clock.json"
    size, problem = None, ""
    try:
        size = size_of(folder)
    except UserError as error:
        problem = str(error)
    return Run(
        name=name,
        config=config,
        curves=read_curves(folder / "metrics.jsonl"),
        clock=json.loads(clock.read_text()) if clock.exists() else {},
        size=size,
        problem=problem,
        samples={name: _head(f, samples) for name, f in _evaluated(folder, "predictions.jsonl")},
        scores={name: json.loads(f.read_text()) for name, f in _evaluated(folder, "report.json")},
    )


def read_curves(file: Path) -> dict[str, Curve]:
    """Every metric of a metrics.jsonl; a half-written last line is no line."""
    points: dict[str, list[tuple[int, float]]] = {}
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            continue
        try:
            values = json.loads(line)
            step = values.pop("step")
        except (json.JSONDecodeError, KeyError) as error:
            raise UserError(f"{file}, line {number} is damaged: {error}") from None
        for name, value in values.items():
            points.setdefault(name, []).append((step, np.nan if value is None else value))
    columns = {name: np.array(found, float).T for name, found in points.items()}
    return {name: Curve(steps.astype(int), values) for name, (steps, values) in columns.items()}


def _evaluated(folder: Path, file: str) -> list[tuple[str, Path]]:
    """What `lm eval --task` wrote, by the name of the split and step."""
    return [(found.parent.name, found) for found in sorted(folder.glob(f"eval/*/{file}"))]


def _head(file: Path, count: int) -> list[dict]:
    with file.open() as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


# The sizes do not depend on the mesh or kernel, which this machine may not have.
SINGLE_DEVICE = {
    "parallel.preset": "custom",
    "model.attention": "xla",
    **{
        f"parallel.mesh.{axis}": "1"
        for axis in ("slice", "stage", "data", "fsdp", "expert", "context", "tensor")
    },
}


class Size(NamedTuple):
    """Parameters in all and without embeddings; tokens and model FLOPs of a step."""

    parameters: int
    non_embedding: int
    tokens_per_step: int
    flops_per_step: float


def size_of(workdir: Path) -> Size:
    """The size of the run in `workdir`, from its configuration alone; nothing is computed."""
    experiment = build(load_config(workdir, SINGLE_DEVICE), jax.devices()[:1])
    counts = count_parameters(experiment)
    tokens = experiment.config.data.batch_size * tokens_per_row(experiment)
    flops = tokens * model_flops_per_token(experiment)
    heads = counts["heads"]
    return Size(counts["total"] + heads, counts["non_embedding"] + heads, tokens, flops)


def swept_keys(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """The keys that differ between runs; those that always change together are one group."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.config):
        values = [repr(run.config.get(key)) for run in runs]
        pattern = tuple(values.index(value) for value in values)
        if any(pattern):
            groups.setdefault(pattern, []).append(key)
    return [tuple(keys) for keys in groups.values()]


def final_metric(runs: Sequence[Run]) -> str:
    """What runs are compared by: validation loss if any has one, else the training loss."""
    evaluated = any(VALIDATION_LOSS in run.curves for run in runs)
    return VALIDATION_LOSS if evaluated else TRAIN_LOSS


def best(runs: Sequence[Run]) -> Run | None:
    """The run with the lowest final metric."""
    metric = final_metric(runs)
    scored = [(value, i) for i, run in enumerate(runs) if (value := run.final(metric)) is not None]
    return runs[min(scored)[1]] if scored else None


def lines_of(
    runs: Sequence[Run], key: str, others: Sequence[str]
) -> dict[tuple[Any, ...], list[Run]]:
    """The runs that agree in all of `others`, by these values, each list in the order of `key`."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in sorted(runs, key=lambda run: _order(run.config.get(key))):
        found.setdefault(tuple(_hashable(run.config.get(o)) for o in others), []).append(run)
    return dict(sorted(found.items(), key=lambda item: [_order(value) for value in item[0]]))


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return (not number, value if number else 0.0, str(value))


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
