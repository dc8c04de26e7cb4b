"""Records of runs, read from their folders, and analysis of their noisy curves.

A record has configuration, curves, clock, size and samples; the analysis smooths and downsamples
curves, and finds spikes and incidents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from numpy.typing import ArrayLike
from scipy.ndimage import median_filter
from scipy.signal import lfilter

from lm import config as configs
from lm.accounting.flops import model_flops_per_token, tokens_per_row
from lm.accounting.parameter_counts import count_parameters
from lm.config.ramps import stages
from lm.config.registries import SCHEMA
from lm.errors import UserError
from lm.evaluation.safety.suite import PREFIX
from lm.experiment import build
from lm.runs.workdir import BATCH_SIZE, RUN_FILE, history_of, load_run_config
from lm.storage import parse_json, read_json
from lm.tools.formatting import duration, printable

VALIDATION_LOSS = "eval/validation/loss"
TRAIN_LOSS = "loss"


# Sizes do not depend on mesh or kernel, which this machine may not support.
SINGLE_DEVICE = {
    "parallel.preset": "custom",
    "model.attention": "xla",
    **{
        f"parallel.mesh.{axis}": "1"
        for axis in ("slice", "stage", "data", "fsdp", "expert", "context", "tensor")
    },
}


class RunSize(NamedTuple):
    """Size of a run.

    Attributes:
        parameters: All parameters.
        non_embedding: Parameters without embeddings.
        tokens_per_step: Tokens per training step.
        flops_per_step: Model FLOPs per training step.
    """

    parameters: int
    non_embedding: int
    tokens_per_step: int
    flops_per_step: float


def size_of(workdir: Path) -> RunSize:
    """Return the size of the run in `workdir`, from its configuration alone."""
    experiment = build(load_run_config(workdir, SINGLE_DEVICE), jax.devices()[:1])
    counts = count_parameters(experiment)
    tokens = experiment.config.data.batch_size * tokens_per_row(experiment)
    flops = tokens * model_flops_per_token(experiment)
    heads = counts["heads"]
    return RunSize(counts["total"] + heads, counts["non_embedding"] + heads, tokens, flops)


@dataclass(frozen=True)
class Curve:
    """Metric values and the steps at which they were written, [points] each; non-finite is NaN."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class RunRecord:
    """Run as recorded in its folder.

    Attributes:
        name: Folder name, relative to the folder of all runs.
        config: Configuration by dotted path.
        curves: Metrics by name.
        clock: Seconds by category, number of starts, goodput; empty without a clock.
        size: Size of the run; None if its configuration can no longer be built.
        problem: Why it cannot be built, or is incomplete.
        damage: Damaged files, one line each.
        samples: First predictions by evaluated split.
        scores: Results of `lm eval --task` by evaluated split.
        history: Configuration changes of the run (`lm.runs.workdir.history_of`).
    """

    name: str
    config: Mapping[str, Any]
    curves: Mapping[str, Curve]
    clock: Mapping[str, Any] = field(default_factory=dict)
    size: RunSize | None = None
    problem: str = ""
    damage: tuple[str, ...] = ()
    samples: Mapping[str, list[dict]] = field(default_factory=dict)
    scores: Mapping[str, dict] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()

    @property
    def last_step(self) -> int:
        """Last training step with metrics; 0 if there is none."""
        return int(self.curves[TRAIN_LOSS].steps[-1]) if TRAIN_LOSS in self.curves else 0

    @property
    def finished(self) -> bool:
        """True if the run reached `train.steps`."""
        return self.last_step >= self.config.get("train.steps", np.inf)

    @property
    def tokens(self) -> int | None:
        """Tokens up to the last step; None if the size is unknown."""
        return round(self._last_batches * self.size.tokens_per_step) if self.size else None

    @property
    def flops(self) -> float | None:
        """Model FLOPs up to the last step; None if the size is unknown."""
        return self._last_batches * self.size.flops_per_step if self.size else None

    @property
    def _last_batches(self) -> float:
        return float(self.batches([self.last_step])[0])

    def batches(self, steps: ArrayLike) -> np.ndarray:
        """Return the number of batches, of the current size, trained up to each step.

        Batches of ramps count as fractions. The size of the run must be known.
        """
        sizes = [
            (entry["step"], entry["changed"][BATCH_SIZE][0])
            for entry in self.history
            if BATCH_SIZE in entry.get("changed", {})
        ]
        now, length = self.config.get(BATCH_SIZE, 1), self.config.get("data.sequence_length", 1)
        ramp = {"batch_ramp": "", "length_ramp": "", "batch_size": now, "sequence_length": length}
        own = {name: self.config.get(f"data.{name}", value) for name, value in ramp.items()}
        ramped = stages(ConfigDict(own))

        def part(step: int) -> float:
            """Return a step's part of the current batch."""
            stage = next(stage for stage in reversed(ramped) if stage.step <= step)
            size = next((size for end, size in sizes if step < end), now)
            return stage.rows * stage.length * size / (now**2 * length)

        at = sorted({*(stage.step for stage in ramped), *(step for step, _ in sizes)})
        parts = np.array([part(step) for step in at])
        trained = np.concatenate([[0.0], np.cumsum(np.diff(at) * parts[:-1])])
        steps = np.asarray(steps, float)
        return np.interp(steps, at, trained) + np.maximum(steps - at[-1], 0) * parts[-1]

    @property
    def total_seconds(self) -> float:
        """Seconds of all parts of the loop over all starts; 0 without a clock."""
        return sum(self.clock.get("seconds", {}).values())

    @property
    def evaluations(self) -> list[str]:
        """Names of evaluation metrics except errors; safety sets have their own page."""
        names = (name for name in self.curves if name.startswith("eval/"))
        return [x for x in names if not x.startswith(PREFIX) and not x.endswith("_stderr")]

    def final(self, metric: str) -> float | None:
        """Return the last value of a metric; for the noisy training loss, the mean of its last 5 %.

        None if there is no value or it is not finite.
        """
        curve = self.curves.get(metric)
        if curve is None:
            return None
        tail = max(1, len(curve.values) // 20) if metric == TRAIN_LOSS else 1
        value = float(np.mean(curve.values[-tail:]))
        return value if np.isfinite(value) else None

    def seconds(self) -> np.ndarray:
        """Return the seconds spent in steps up to each point of `seconds_per_step`, [points]."""
        curve = self.curves["seconds_per_step"]
        return np.cumsum(np.nan_to_num(curve.values) * np.diff(curve.steps, prepend=0))


def find_runs(*workdirs: Path, n_samples: int = 0) -> list[RunRecord]:
    """Read the run in each folder, or those in its subfolders, ordered by name.

    Args:
        workdirs: Folders of a run, or of runs.
        n_samples: Predictions to read per evaluated split.

    Raises:
        UserError: A folder has no runs.
    """
    folders: dict[Path, str] = {}  # names by folder
    for workdir in workdirs:
        name = workdir.resolve().name
        if (workdir / RUN_FILE).exists():
            folders.setdefault(workdir, name)
            continue
        files = sorted([*workdir.glob(f"*/{RUN_FILE}"), *workdir.glob(f"*/*/{RUN_FILE}")])
        if not files:
            raise UserError(f"no run in {workdir}: neither it nor its subfolders have a {RUN_FILE}")
        above = Path(name) if len(workdirs) > 1 else Path()
        for file in files:
            folders.setdefault(file.parent, str(above / file.parent.relative_to(workdir)))
    names = Counter(folders.values())
    return [
        read_run(folder, name if names[name] == 1 else str(folder), n_samples)
        for folder, name in folders.items()
    ]


def read_run(folder: Path, name: str, n_samples: int = 0) -> RunRecord:
    """Read the folder of a run; missing and damaged parts are left out."""
    damage: list[str] = []

    def part(read: Callable[[], Any], empty: Any) -> Any:
        try:
            return read()
        except FileNotFoundError:
            return empty
        except UserError as error:
            damage.append(str(error))
            return empty

    config = part(lambda: _read_config(folder / RUN_FILE, damage), {})
    size, problem = None, ""
    try:
        size = size_of(folder)
    except Exception as error:  # the configuration is damaged or of another version
        problem = " ".join(str(error).split()) if isinstance(error, UserError) else repr(error)
    history = part(lambda: history_of(read_json(folder / RUN_FILE)), [])
    curves = part(lambda: _read_curves(folder / "metrics.jsonl", damage), {})
    unusable = damage[0] if damage else ""
    clock = part(lambda: _read_clock(folder / "clock.json"), {})
    samples, scores = {}, {}
    for split, file in _evaluated(folder, "predictions.jsonl"):
        samples[printable(split)] = part(partial(_head, file, n_samples), [])
    for split, file in _evaluated(folder, "report.json"):
        scores[printable(split)] = part(partial(read_json, file), {})
    return RunRecord(
        name=printable(name),
        config=config,
        curves=curves,
        clock=clock,
        size=size,
        problem=unusable or problem,
        damage=tuple(dict.fromkeys(damage)),
        samples=samples,
        scores=scores,
        history=history,
    )


def _read_config(file: Path, damage: list[str]) -> dict[str, Any]:
    """Read the configuration by dotted path, without values of a wrong type."""
    values = read_json(file).get("config")
    if not isinstance(values, dict):
        raise UserError(f"{file}: damaged (it contains no configuration)")
    try:
        config = dict(configs.flatten(values))
    except RecursionError:
        raise UserError(f"{file}: damaged (nested too deeply)") from None
    wrong = [path for path, value in config.items() if not _has_type(path, value)]
    if wrong:
        damage.append(f"{file}: damaged (wrong type of {', '.join(wrong[:3])})")
    return {path: value for path, value in config.items() if path not in wrong}


def _has_type(path: str, value: Any) -> bool:
    kind = SCHEMA[path].type if path in SCHEMA else None
    if kind in (int, float) or (kind is None and isinstance(value, int)):
        return _is_number(value) or (kind is None and isinstance(value, bool))
    return kind is None or isinstance(value, list | tuple if kind is tuple else kind)


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that can be plotted."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _read_clock(file: Path) -> dict[str, Any]:
    clock = read_json(file)
    seconds = clock.get("seconds", {})
    numbers = [clock.get(name, 0) for name in ("starts", "goodput", "steps_computed")]
    numbers += seconds.values() if isinstance(seconds, dict) else [None]
    if not all(_is_number(number) and number >= 0 for number in numbers):
        raise UserError(f"{file}: damaged (it contains a value that is not a number)")
    return clock


def _read_curves(file: Path, damage: list[str]) -> dict[str, Curve]:
    """Read every metric; an unfinished last line is ignored, a damaged one reported."""
    points: dict[str, dict[int, float]] = {}
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    problems = []
    for number, line in enumerate(lines, 1):
        try:
            values = parse_json(line, f"{file}, line {number}")
            step = values.pop("step", None)
            if not isinstance(step, int) or not 0 <= step < 2**53:
                raise UserError(f"{file}, line {number} is damaged: its step is {step!r:.40}")
        except UserError as error:
            problems.append(str(error))
            continue
        if not all(value is None or isinstance(value, int | float) for value in values.values()):
            problems.append(f"{file}, line {number} is damaged: a metric is not a number")
        for name, value in values.items():
            shown = float(value) if _is_number(value) else np.nan
            points.setdefault(printable(name), {})[step] = shown
    if problems:
        more = f" ({len(problems)} such lines)" if len(problems) > 1 else ""
        damage.append(problems[0] + more)
    columns = {name: sorted(found.items()) for name, found in points.items()}
    return {
        name: Curve(np.array([s for s, _ in column], int), np.array([v for _, v in column], float))
        for name, column in columns.items()
    }


def _evaluated(folder: Path, file: str) -> list[tuple[str, Path]]:
    """Return the files that `lm eval --task` wrote, by SPLIT-STEP."""
    return [(found.parent.name, found) for found in sorted(folder.glob(f"eval/*/{file}"))]


def _head(file: Path, count: int) -> list[dict]:
    try:
        with file.open("rb") as stream:
            lines = list(islice(stream, count))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    return [parse_json(line, f"{file}, line {i}") for i, line in enumerate(lines, 1)]


def swept_keys(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Return the keys in which runs differ; keys that always change together form one group."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.config):
        values = [repr(run.config.get(key)) for run in runs]
        pattern = tuple(values.index(value) for value in values)
        if any(pattern):
            groups.setdefault(pattern, []).append(key)
    return [tuple(keys) for keys in groups.values()]


def final_metric(runs: Sequence[RunRecord]) -> str:
    """Return the metric to compare runs by: validation loss if available, else training loss."""
    evaluated = any(VALIDATION_LOSS in run.curves for run in runs)
    return VALIDATION_LOSS if evaluated else TRAIN_LOSS


def best_run(runs: Sequence[RunRecord]) -> RunRecord | None:
    """Return the run with the lowest final metric; None if no run has one."""
    metric = final_metric(runs)
    scored = [(value, i) for i, run in enumerate(runs) if (value := run.final(metric)) is not None]
    return runs[min(scored)[1]] if scored else None


def group_runs(
    runs: Sequence[RunRecord], key: str, others: Sequence[str]
) -> dict[tuple[Any, ...], list[RunRecord]]:
    """Group runs by their values of `others`; each group is ordered by `key`."""
    found: dict[tuple[Any, ...], list[RunRecord]] = {}
    for run in sorted(runs, key=lambda run: _order(run.config.get(key))):
        found.setdefault(tuple(_hashable(run.config.get(o)) for o in others), []).append(run)
    return dict(sorted(found.items(), key=lambda item: [_order(value) for value in item[0]]))


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return (not number, value if number else 0.0, str(value))


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


POINTS = 400  # maximum points per figure
SPIKE = 12.0  # height of a spike above the preceding losses, in median deviations
STALL = 10.0  # duration of a stall, in median steps


def smooth(values: np.ndarray, part: float = 0.01) -> np.ndarray:
    """Smooth on both sides, without lagging behind a falling loss; NaN is ignored.

    Args:
        values: Curve, [points].
        part: Half-life of the weights, as a fraction of the curve.
    """
    keep = 0.5 ** (1 / max(1.0, part * len(values)))
    valid = np.isfinite(values)

    def total(x: np.ndarray) -> np.ndarray:
        before, after = (lfilter([1], [1, -keep], side) for side in (x, x[::-1]))
        return before + after[::-1] - x

    with np.errstate(invalid="ignore"):
        return total(np.where(valid, values, 0.0)) / total(valid.astype(float))


def downsample(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Downsample a curve to about 400 points: both ends, and the extrema of each interval."""
    if len(x) <= POINTS:
        return x, y
    chosen = {0, len(x) - 1}
    for interval in np.array_split(np.arange(len(x)), POINTS // 2):
        finite = interval[np.isfinite(y[interval])]
        if len(finite):
            chosen |= {finite[np.argmin(y[finite])], finite[np.argmax(y[finite])]}
    kept = np.array(sorted(chosen))
    return x[kept], y[kept]


def spikes(values: np.ndarray) -> np.ndarray:
    """Return the indices where a loss is far, and at least a tenth, above the preceding ones."""
    if not np.isfinite(values).any():
        return np.array([], int)
    values = np.nan_to_num(values, nan=np.nanmedian(values))
    width = min(51, len(values))
    before = median_filter(values, width, mode="nearest", origin=(width - 1) // 2)
    noise = np.abs(values - median_filter(values, width, mode="reflect"))
    usual = median_filter(noise, min(501, len(values)), mode="reflect")
    return np.flatnonzero(values - before > np.maximum(SPIKE * usual, 0.1 * np.abs(before)))


def incidents(run: RunRecord) -> list[str]:
    """Describe restarts, lost steps, loss spikes and stalls, one line each, most severe first."""
    found = list(dict.fromkeys([*run.damage, *([run.problem] if run.problem else [])]))
    if TRAIN_LOSS not in run.curves:
        return [*found, "no training step was recorded"]
    loss = run.curves[TRAIN_LOSS]
    if not run.finished and "train.steps" in run.config:
        found.append(f"stopped at step {run.last_step:,} of {run.config['train.steps']:,}")
    if not np.isfinite(loss.values).all():
        found.append(f"loss not finite at {_steps(loss.steps[~np.isfinite(loss.values)])}")
    if "skipped" in run.curves and run.curves["skipped"].values.any():
        skipped = run.curves["skipped"]
        found.append(f"update skipped at {_steps(skipped.steps[skipped.values > 0])}")
    found += _restarts(run)
    jumps = loss.steps[spikes(loss.values)]
    if len(jumps):
        found.append(f"loss jumped at {_steps(jumps)}")
    return found + _stalls(run)


def _restarts(run: RunRecord) -> list[str]:
    starts = run.clock.get("starts", 1)
    again = run.clock.get("steps_computed", 0) - run.last_step
    lines = [f"restarted: {starts} starts"] if starts > 1 else []
    return lines + ([f"{again:,} steps recomputed after a restart"] if again > 0 else [])


def _stalls(run: RunRecord) -> list[str]:
    if "seconds_per_step" not in run.curves:
        return []
    curve = run.curves["seconds_per_step"]
    if not np.isfinite(curve.values).any():
        return []
    slow = curve.values > STALL * np.nanmedian(curve.values)
    if not slow.any():
        return []
    lost = (curve.values * np.diff(curve.steps, prepend=0))[slow].sum()
    steps = _steps(curve.steps[slow])
    return [f"more than {STALL:g}× slower than usual for {duration(lost)}, {steps}"]


def _steps(steps: np.ndarray) -> str:
    """Format the first few steps and the total number."""
    few = ", ".join(f"{step:,}" for step in steps[:5])
    more = f" … ({len(steps)} in all)" if len(steps) > 5 else ""
    return f"step{'s' if len(steps) > 1 else ''} {few}{more}"
