"""Analysis of noisy curves: smoothing, downsampling, spikes, and the incidents of a run."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import median_filter
from scipy.signal import lfilter

from lm.tools.formatting import duration
from lm.tools.reports.run_records import TRAIN_LOSS, RunRecord

POINTS = 400  # as many as a figure can show
SPIKE = 12.0  # height of a spike above the preceding losses, in median deviations
STALL = 10.0  # duration of a stall, in median steps


def smooth(values: np.ndarray, part: float = 0.01) -> np.ndarray:
    """Average over both sides, so that it does not lag behind a falling loss; NaN is ignored.

    Args:
        values: Curve, [points].
        part: Half-life of the weights, as a part of the curve.
    """
    keep = 0.5 ** (1 / max(1.0, part * len(values)))
    valid = np.isfinite(values)

    def total(x: np.ndarray) -> np.ndarray:
        before, after = (lfilter([1], [1, -keep], side) for side in (x, x[::-1]))
        return before + after[::-1] - x

    with np.errstate(invalid="ignore"):
        return total(np.where(valid, values, 0.0)) / total(valid.astype(float))


def downsample(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep about 400 points of a curve: both ends, and minimum and maximum of each interval."""
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
    """Return the indices at which a loss is far, and at least a tenth, above the preceding ones."""
    if not np.isfinite(values).any():
        return np.array([], int)
    values = np.nan_to_num(values, nan=np.nanmedian(values))
    width = min(51, len(values))
    before = median_filter(values, width, mode="nearest", origin=(width - 1) // 2)
    noise = np.abs(values - median_filter(values, width, mode="reflect"))
    usual = median_filter(noise, min(501, len(values)), mode="reflect")
    return np.flatnonzero(values - before > np.maximum(SPIKE * usual, 0.1 * np.abs(before)))


def incidents(run: RunRecord) -> list[str]:
    """Describe restarts, lost steps, loss spikes and stalls, one line each, the gravest first."""
    found = [run.problem] if run.problem else []
    if TRAIN_LOSS not in run.curves:
        return [*found, "no training step was written"]
    loss = run.curves[TRAIN_LOSS]
    if not run.finished:
        found.append(f"stopped at step {run.last_step:,} of {run.config['train.steps']:,}")
    if not np.isfinite(loss.values).all():
        found.append(f"loss not finite at {_steps(loss.steps[~np.isfinite(loss.values)])}")
    if "skipped" in run.curves and run.curves["skipped"].values.any():
        skipped = run.curves["skipped"]
        found.append(f"update left out at {_steps(skipped.steps[skipped.values > 0])}")
    found += _restarts(run)
    jumps = loss.steps[spikes(loss.values)]
    if len(jumps):
        found.append(f"loss jumped at {_steps(jumps)}")
    return found + _stalls(run)


def _restarts(run: RunRecord) -> list[str]:
    starts = run.clock.get("starts", 1)
    again = run.clock.get("steps_computed", 0) - run.last_step
    lines = [f"restarted: {starts} starts"] if starts > 1 else []
    return lines + ([f"{again:,} steps computed again after a restart"] if again > 0 else [])


def _stalls(run: RunRecord) -> list[str]:
    if "seconds_per_step" not in run.curves:
        return []
    curve = run.curves["seconds_per_step"]
    slow = curve.values > STALL * np.nanmedian(curve.values)
    if not slow.any():
        return []
    lost = (curve.values * np.diff(curve.steps, prepend=0))[slow].sum()
    steps = _steps(curve.steps[slow])
    return [f"more than {STALL:g}× slower than usual for {duration(lost)}, {steps}"]


def _steps(steps: np.ndarray) -> str:
    """Format the first few steps and the number of all."""
    few = ", ".join(f"{step:,}" for step in steps[:5])
    more = f" … ({len(steps)} in all)" if len(steps) > 5 else ""
    return f"step{'s' if len(steps) > 1 else ''} {few}{more}"
