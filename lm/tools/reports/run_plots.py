"""Figures of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.tools.formatting import shown
from lm.tools.reports.plotting import (
    COLORS,
    WIDTH,
    colors,
    legend,
    shades,
    subplots,
    time_axis,
    value_axis,
)
from lm.tools.reports.run_records import (
    TRAIN_LOSS,
    VALIDATION_LOSS,
    RunRecord,
    downsample,
    final_metric,
    group_runs,
    smooth,
)
from lm.training.monitor import CLOCK_PARTS

Figures = dict[str, Any]  # by file name
X_AXES = {"step": "step", "tokens": "tokens", "FLOPs": "model FLOPs", "time": "time in steps"}
# Metrics of a training step beside its loss, with the labels of their axes.
HEALTH = {
    "accuracy": "accuracy in training",
    "nll": "loss without regularisers",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
    "mfu": "model FLOPs utilisation",
}


def positions(run: RunRecord, axis: str, steps: np.ndarray) -> np.ndarray | None:
    """Return the coordinates of steps on one of X_AXES; None if the run does not record them."""
    if axis == "step":
        return steps
    if axis == "time":
        if "seconds_per_step" not in run.curves:
            return None
        known = run.curves["seconds_per_step"].steps
        return np.interp(steps, [0, *known], [0.0, *run.seconds()])
    if run.size is None:
        return None
    return steps * float(run.size.tokens_per_step if axis == "tokens" else run.size.flops_per_step)


def loss_curves(runs: Sequence[RunRecord]) -> Figures:
    """Plot training loss (raw and smoothed) and validation loss over each recorded axis."""
    first = np.zeros(1)
    return {
        axis: _loss_curve(runs, axis)
        for axis in X_AXES
        if any(positions(run, axis, first) is not None for run in runs)
    }


def _loss_curve(runs: Sequence[RunRecord], axis: str) -> Any:
    figure, axes = subplots()
    levels: list[float] = []
    for run, color in zip(runs, colors(len(runs)), strict=True):
        for metric in (TRAIN_LOSS, VALIDATION_LOSS):
            curve = run.curves.get(metric)
            x = None if curve is None else positions(run, axis, curve.steps)
            if curve is None or x is None:
                continue
            if metric == VALIDATION_LOSS:
                style = {"color": color, "markeredgecolor": "white", "markersize": 6}
                axes.plot(x, curve.values, "o", **style)
                levels += curve.values.tolist()
                continue
            smoothed = smooth(curve.values)
            if len(runs) <= len(COLORS):
                axes.plot(*downsample(x, curve.values), color=color, alpha=0.22, linewidth=0.8)
            axes.plot(*downsample(x, smoothed), color=color, label=run.name)
            levels += smoothed[len(smoothed) // 50 :].tolist()
    axes.set(xlabel=X_AXES[axis], ylabel="loss, nats")
    if axis == "time":
        time_axis(axes.xaxis)
    _focus(axes, levels)
    legend(axes, len(runs))
    return figure


def _focus(axes: Any, levels: Sequence[float]) -> None:
    """Limit the y axis to `levels`, which are without the first steep steps and spikes."""
    finite = np.array([level for level in levels if np.isfinite(level)])
    if len(finite) and np.ptp(finite) > 0:
        margin = 0.06 * np.ptp(finite)
        axes.set_ylim(finite.min() - margin, finite.max() + margin)


def metric_curves(runs: Sequence[RunRecord]) -> Figures:
    """Plot every other evaluation metric, and those of HEALTH, over the steps."""
    evaluations = dict.fromkeys(name for run in runs for name in run.evaluations)
    names = {
        name: name.removeprefix("eval/").replace("/", " ").replace("_", " ")
        for name in evaluations
        if name != VALIDATION_LOSS and not name.endswith("/targets")
    }
    return {
        name.replace("/", "_"): _metric_curve(runs, name, title)
        for name, title in (names | HEALTH).items()
        if any(name in run.curves for run in runs)
    }


def _metric_curve(runs: Sequence[RunRecord], name: str, title: str) -> Any:
    figure, axes = subplots()
    for run, color in zip(runs, colors(len(runs)), strict=True):
        curve = run.curves.get(name)
        if curve is None:
            continue
        if name.startswith("eval/"):
            axes.plot(curve.steps, curve.values, "o-", markersize=5, color=color, label=run.name)
        elif name == "learning_rate":
            axes.plot(*downsample(curve.steps, curve.values), color=color, label=run.name)
        else:
            if len(runs) <= len(COLORS):
                raw = downsample(curve.steps, curve.values)
                axes.plot(*raw, color=color, alpha=0.22, linewidth=0.8)
            axes.plot(*downsample(curve.steps, smooth(curve.values)), color=color, label=run.name)
    axes.set(xlabel="step", ylabel=title)
    legend(axes, len(runs))
    return figure


def final_by_key(runs: Sequence[RunRecord], groups: Sequence[tuple[str, ...]]) -> Figures:
    """Plot the final metric over each swept key; lines join runs that differ in nothing else."""
    metric = final_metric(runs)
    scored = [run for run in runs if run.final(metric) is not None]
    values = {group[0]: {shown(run.config.get(group[0])) for run in scored} for group in groups}
    keys = [key for key, found in values.items() if len(found) > 1]
    return {
        f"final_by_{key}": _final_by(scored, metric, key, [k for k in keys if k != key])
        for key in keys
    }


def _final_by(runs: Sequence[RunRecord], metric: str, key: str, others: Sequence[str]) -> Any:
    figure, axes = subplots()
    found = group_runs(runs, key, others)
    values: list[Any] = [run.config.get(key) for run in runs]
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    names = sorted({shown(value) for value in values})
    labelled = len(others) == 1
    for (shared_values, line), color in zip(found.items(), shades(len(found)), strict=True):
        at = [run.config.get(key) for run in line]
        x = at if numeric else [names.index(shown(value)) for value in at]
        label = f"{others[0].rsplit('.', 1)[-1]} {shown(shared_values[0])}" if labelled else None
        y = [run.final(metric) for run in line]
        axes.plot(x, y, "o-", markersize=7, color=color if others else COLORS[0], label=label)
    if numeric:
        value_axis(axes.xaxis, values)
    else:
        axes.set_xticks(range(len(names)), names)
    axes.set(xlabel=key, ylabel=metric.removeprefix("eval/").replace("/", " "))
    legend(axes, len(found) if labelled else 0, outside=True)
    return figure


def time_split(runs: Sequence[RunRecord]) -> Any:
    """Plot the parts of the loop in each run's time, in percent; None without any clock."""
    timed = [run for run in runs if run.total_seconds]
    if not timed:
        return None
    height = 1.6 + 0.34 * len(timed)
    figure, axes = subplots(figsize=(WIDTH, min(height, 12)))
    left = np.zeros(len(timed))
    names = [run.name if len(run.name) <= 28 else f"…{run.name[-27:]}" for run in timed]
    order = ("step", *(part for part in CLOCK_PARTS if part != "step"))
    for part, color in zip(order, COLORS, strict=False):
        seconds = np.array([run.clock["seconds"].get(part, 0.0) for run in timed])
        share = 100 * seconds / [run.total_seconds for run in timed]
        axes.barh(range(len(timed)), share, left=left, color=color, label=part, height=0.7)
        left += share
    axes.set_yticks(range(len(timed)), names)
    axes.invert_yaxis()
    axes.set(xlabel="% of the time", xlim=(0, 100))
    axes.grid(axis="y", visible=False)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=6,
        frameon=False,
        fontsize=9.5,
        columnspacing=1,
        handlelength=1,
    )
    return figure
