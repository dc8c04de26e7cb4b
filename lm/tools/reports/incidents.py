"""What did not go smoothly in a run: restarts, lost steps, jumps of the loss, stalls."""

from __future__ import annotations

import numpy as np

from lm.tools.reports.downsampling import spikes
from lm.tools.reports.numbers import duration
from lm.tools.reports.run_records import TRAIN_LOSS, Run

STALL = 10.0  # a step of so many times the median's seconds is a stall


def incidents(run: Run) -> list[str]:
    """One line each, the gravest first; none if all went well."""
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


def _restarts(run: Run) -> list[str]:
    starts = run.clock.get("starts", 1)
    again = run.clock.get("steps_computed", 0) - run.last_step
    lines = [f"restarted: {starts} starts"] if starts > 1 else []
    return lines + ([f"{again:,} steps computed again after a restart"] if again > 0 else [])


def _stalls(run: Run) -> list[str]:
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
    """Steps in words: the first few, with how many there are."""
    few = ", ".join(f"{step:,}" for step in steps[:5])
    more = f" … ({len(steps)} in all)" if len(steps) > 5 else ""
    return f"step{'s' if len(steps) > 1 else ''} {few}{more}"
