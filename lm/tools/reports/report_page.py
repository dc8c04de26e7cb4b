"""`lm report`: a self-contained page, and PNGs of its figures, for a run or a folder of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm import config as configs
from lm.storage.folder_names import short_name
from lm.tools.formatting import duration, printable, short, shown
from lm.tools.html_pages import page_template
from lm.tools.reports.plotting import (
    COLORS,
    FAINT,
    WIDTH,
    colors,
    legend,
    plain,
    save_png,
    shades,
    subplots,
    svg,
    time_axis,
    value_axis,
)
from lm.tools.reports.run_records import (
    TRAIN_LOSS,
    VALIDATION_LOSS,
    RunRecord,
    best_run,
    downsample,
    final_metric,
    find_runs,
    group_runs,
    incidents,
    smooth,
    swept_keys,
)
from lm.training.monitor import CLOCK_PARTS

N_SAMPLES = 6  # predictions shown per split
TEMPLATE = Path(__file__).with_name("page.html")


class Cell(NamedTuple):
    """Table cell: text, sort value (None: the text; "": last), color of a dot."""

    text: str
    value: float | str | None = None
    color: str = ""


def write_page(workdirs: Sequence[Path], output: Path) -> Path:
    """Write index.html and the PNGs to `output`; return the path of the page.

    Raises:
        UserError: One of `workdirs` has no run, or the extra "report" is not installed.
    """
    template, runs = page_template(TEMPLATE), find_runs(*workdirs, n_samples=N_SAMPLES)
    groups = swept_keys(runs)
    several = len(runs) > 1
    loss = loss_curves(runs)
    finals, metrics = final_by_key(runs, groups), metric_curves(runs)
    time = time_split(runs)
    output.mkdir(parents=True, exist_ok=True)
    by_name = {f"loss_by_{axis}": figure for axis, figure in loss.items()} | finals | metrics
    for name, figure in (by_name | ({"time": time} if time else {})).items():
        save_png(figure, output / f"{short_name(name)}.png")
    keys = [key for group in groups for key in group]
    text = template.render(
        title=", ".join(printable(workdir.resolve().name) for workdir in workdirs),
        lead=_lead(runs),
        several=several,
        tiles=_summary(runs),
        loss={axis: svg(figure) for axis, figure in loss.items()},
        finals=[svg(figure) for figure in finals.values()],
        metrics=[svg(figure) for figure in metrics.values()],
        time=svg(time) if time else None,
        starts=sum(run.clock.get("starts", 1) for run in runs),
        runs=_runs_table(runs, groups) if several else None,
        incidents=[
            f"{run.name}: {line}" if several else line for run in runs for line in incidents(run)
        ],
        scores=_scores(runs),
        samples=_samples(runs),
        history=_history(runs),
        differences=_differences(runs, keys),
        changed=_changed(runs[0], keys),
    )
    page = output / "index.html"
    page.write_bytes(text.encode(errors="replace"))
    return page


def _lead(runs: Sequence[RunRecord]) -> str:
    kinds = [
        [str(run.config[key]) for key in ("model.family", "objective.name") if key in run.config]
        for run in runs
    ]
    families = sorted({", ".join(dict.fromkeys(kind)) or "unknown" for kind in kinds})
    sources = sorted({str(run.config.get("data.source", "unknown")) for run in runs})
    count = "One run" if len(runs) == 1 else f"{len(runs)} runs"
    return f"{count}: {'; '.join(families)}; on {'; '.join(sources)}."


def _summary(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Return the headline figures by caption."""
    metric, best = final_metric(runs), best_run(runs)
    name = metric.removeprefix("eval/").replace("/", " ") if "/" in metric else "training loss"
    seconds = sum(run.total_seconds for run in runs)
    useful = sum(run.clock.get("goodput", 0.0) * run.total_seconds for run in runs)
    tiles = {}
    if best:
        tiles[f"{'best ' if len(runs) > 1 else ''}{name}"] = _figure(metric, best.final(metric))
    if len(runs) > 1:
        if best:
            tiles["by run"] = best.name
        tiles["finished"] = f"{sum(run.finished for run in runs)} of {len(runs)}"
    else:
        steps = runs[0].config.get("train.steps")
        goal = "" if runs[0].finished or steps is None else f" of {steps:,}"
        tiles["steps"] = f"{runs[0].last_step:,}{goal}"
    sizes = {run.size.parameters for run in runs if run.size}
    if sizes:
        tiles["parameters"] = " – ".join(short(n) for n in sorted({min(sizes), max(sizes)}))
        tiles["tokens"] = short(sum(run.tokens or 0 for run in runs))
        tiles["model FLOPs"] = short(sum(run.flops or 0 for run in runs))
    if seconds:
        tiles["time"] = duration(seconds)
        tiles["goodput"] = f"{useful / seconds:.1%}"
    return tiles


def _runs_table(runs: Sequence[RunRecord], groups: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """Return one row per run: the keys in which runs differ, metrics, sizes and time."""
    metric = final_metric(runs)
    others = dict.fromkeys(name for run in runs for name in run.evaluations)
    metrics = [name for name in others if name != metric and not name.endswith("/targets")]
    columns = ["run", metric, *(group[0] for group in groups), *metrics]
    columns += ["steps", "parameters", "tokens", "FLOPs", "time", "tokens/s", "goodput"]
    best = best_run(runs)
    rows = []
    for run, color in zip(runs, colors(len(runs)), strict=True):
        speed = run.curves.get("tokens_per_second")
        sizes = run.size and run.size.parameters, run.tokens, run.flops
        rows.append(
            [
                Cell(run.name, color=color),
                _number(run.final(metric), partial(_figure, metric)),
                *(_value(run.config.get(group[0])) for group in groups),
                *(_number(run.final(name), partial(_figure, name)) for name in metrics),
                _number(run.last_step, "{:,}".format),
                *(_number(value, short) for value in sizes),
                _number(run.total_seconds or None, duration),
                _number(float(np.nanmedian(speed.values)) if speed else None, short),
                _number(run.clock.get("goodput"), "{:.1%}".format),
            ]
        )
    return {
        "columns": [name.removeprefix("eval/") for name in columns],
        "rows": rows,
        "best": runs.index(best) if best else None,
    }


def _value(value: Any) -> Cell:
    if shown(value) == shown(None):
        return Cell(shown(value), "")
    is_number = isinstance(value, int | float) and abs(value) < 1e300
    return Cell(shown(value), float(value) if is_number else None)


def _figure(metric: str, value: float | None) -> str:
    """Format a metric: perplexities with five significant digits."""
    return f"{value:.5g}" if metric.endswith("perplexity") else f"{value:.4f}"


def _number(value: float | None, form: Callable[[Any], str]) -> Cell:
    return _value(None) if value is None else Cell(form(value), float(value))


def _scores(runs: Sequence[RunRecord]) -> dict[str, Any] | None:
    """Return a row for each result of `lm eval --task`."""
    found = [
        {"run": run.name, "evaluation": name, **scores}
        for run in runs
        for name, scores in run.scores.items()
    ]
    columns = _columns(found)
    rows = [[_value(scores.get(column)) for column in columns] for scores in found]
    return {"columns": columns, "rows": rows} if rows else None


def _samples(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return the first predictions of each evaluated split, as tables of texts."""
    found = []
    for run in runs:
        for split, samples in run.samples.items():
            columns = _columns(samples)
            rows = [[shown(sample.get(column)) for column in columns] for sample in samples]
            table = {"columns": columns, "rows": rows}
            found.append({"run": run.name, "split": split, "table": table})
    return found


def _columns(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _history(runs: Sequence[RunRecord]) -> dict[str, Any] | None:
    """Return the configuration changes of each run, and the origins of forks."""
    rows = []
    for run in runs:
        for entry in run.history:
            lead = [Cell(run.name), _number(entry["step"], "{:,}".format)]
            if "forked_from" in entry:
                rows.append(
                    [*lead, Cell("forked from"), Cell(printable(str(entry["forked_from"])))]
                )
            for key, (old, new) in entry.get("changed", {}).items():
                rows.append([*lead, Cell(printable(key)), Cell(f"{shown(old)} → {shown(new)}")])
    return {"columns": ["run", "after step", "key", "change"], "rows": rows} if rows else None


def _differences(runs: Sequence[RunRecord], keys: Sequence[str]) -> dict[str, Any] | None:
    """Return the keys in which runs differ, one column per run."""
    rows = [[Cell(key), *(_value(run.config.get(key)) for run in runs)] for key in keys]
    return {"columns": ["key", *(run.name for run in runs)], "rows": rows} if keys else None


def _changed(run: RunRecord, leave: Sequence[str]) -> dict[str, Any] | None:
    """Return the keys of a run that differ from their defaults, except those in `leave`."""
    defaults = dict(configs.flatten(configs.default()))
    rows = [
        [Cell(key), _value(value), _value(defaults.get(key))]
        for key, value in run.config.items()
        if key not in leave and shown(value) != shown(defaults.get(key))
    ]
    return {"columns": ["key", "value", "default"], "rows": rows} if rows else None


Figures = dict[str, Any]  # by file name
X_AXES = {"step": "step", "tokens": "tokens", "FLOPs": "model FLOPs", "time": "time in steps"}
# Metrics of a training step besides its loss, with their axis labels.
HEALTH = {
    "accuracy": "accuracy in training",
    "nll": "loss without regularizers",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
    "mfu": "model FLOPs utilization",
}


def positions(run: RunRecord, axis: str, steps: np.ndarray) -> np.ndarray | None:
    """Return the coordinates of steps on one of X_AXES; None if not recorded."""
    if axis == "step":
        return steps
    if axis == "time":
        if "seconds_per_step" not in run.curves:
            return None
        known = run.curves["seconds_per_step"].steps
        return np.interp(steps, [0, *known], [0.0, *run.seconds()])
    if run.size is None:
        return None
    each = run.size.tokens_per_step if axis == "tokens" else run.size.flops_per_step
    return run.batches(steps) * float(each)


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
            axes.plot(*downsample(x, smoothed), color=color, label=plain(run.name))
            levels += smoothed[len(smoothed) // 50 :].tolist()
    axes.set(xlabel=X_AXES[axis], ylabel="loss, nats")
    if axis == "time":
        time_axis(axes.xaxis)
    _focus(axes, levels)
    legend(axes, len(runs))
    return figure


def _focus(axes: Any, levels: Sequence[float]) -> None:
    """Limit the y axis to `levels`, which exclude the first steep steps and spikes."""
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
        style = {"color": color, "label": plain(run.name)}
        if name.startswith("eval/"):
            axes.plot(curve.steps, curve.values, "o-", markersize=5, **style)
        elif name == "learning_rate":
            axes.plot(*downsample(curve.steps, curve.values), **style)
        else:
            if len(runs) <= len(COLORS):
                raw = downsample(curve.steps, curve.values)
                axes.plot(*raw, color=color, alpha=0.22, linewidth=0.8)
            axes.plot(*downsample(curve.steps, smooth(curve.values)), **style)
    axes.set(xlabel="step", ylabel=plain(title))
    legend(axes, len(runs))
    return figure


def final_by_key(runs: Sequence[RunRecord], groups: Sequence[tuple[str, ...]]) -> Figures:
    """Plot the final metric over each swept key; lines connect runs that differ in nothing else."""
    metric = final_metric(runs)
    scored = [run for run in runs if run.final(metric) is not None]
    values = {group[0]: {shown(run.config.get(group[0])) for run in scored} for group in groups}
    keys = [key for key, found in values.items() if len(found) > 1]
    of_run = dict(zip((run.name for run in runs), colors(len(runs)), strict=True))
    return {
        f"final_by_{key}": _final_by(scored, metric, key, [k for k in keys if k != key], of_run)
        for key in keys
    }


def _final_by(
    runs: Sequence[RunRecord],
    metric: str,
    key: str,
    others: Sequence[str],
    of_run: Mapping[str, str],
) -> Any:
    figure, axes = subplots()
    found = group_runs(runs, key, others)
    values: list[Any] = [run.config.get(key) for run in runs]
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    names = sorted({shown(value) for value in values})
    labeled = len(others) == 1
    for (shared_values, line), color in zip(found.items(), shades(len(found)), strict=True):
        at = [run.config.get(key) for run in line]
        x = at if numeric else [names.index(shown(value)) for value in at]
        label = None
        if labeled:
            label = plain(f"{others[0].rsplit('.', 1)[-1]} {shown(shared_values[0])}")
        y = [run.final(metric) for run in line]
        axes.plot(x, y, "-", color=color if others else FAINT, label=label, zorder=2)
        axes.scatter(x, y, s=49, color=[of_run[run.name] for run in line], zorder=3)
    if numeric:
        value_axis(axes.xaxis, values)
    else:
        axes.set_xticks(range(len(names)), [plain(name) for name in names])
    axes.set(xlabel=plain(key), ylabel=metric.removeprefix("eval/").replace("/", " "))
    legend(axes, len(found) if labeled else 0, outside=True)
    return figure


def time_split(runs: Sequence[RunRecord]) -> Any:
    """Plot each run's time by category in percent; None without any clock."""
    timed = [run for run in runs if run.total_seconds]
    if not timed:
        return None
    height = 1.6 + 0.34 * len(timed)
    figure, axes = subplots(figsize=(WIDTH, min(height, 12)))
    left = np.zeros(len(timed))
    names = [plain(run.name if len(run.name) <= 28 else f"…{run.name[-27:]}") for run in timed]
    order = ("step", *(part for part in CLOCK_PARTS if part != "step"))
    for part, color in zip(order, COLORS, strict=False):
        seconds = np.array([run.clock["seconds"].get(part, 0.0) for run in timed])
        share = 100 * seconds / [run.total_seconds for run in timed]
        axes.barh(range(len(timed)), share, left=left, color=color, label=part, height=0.7)
        left += share
    axes.set_yticks(range(len(timed)), names)
    axes.invert_yaxis()
    axes.set(xlabel="% of wall time", xlim=(0, 100))
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
