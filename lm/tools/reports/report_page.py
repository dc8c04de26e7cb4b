"""`lm report`: one self-contained page, and PNGs of its figures, of a run or a folder of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm import config as configs
from lm.tools.formatting import duration, short, shown
from lm.tools.reports import html
from lm.tools.reports import run_plots as figures
from lm.tools.reports.curves import incidents
from lm.tools.reports.html import Cell
from lm.tools.reports.plotting import colors, save_png, svg
from lm.tools.reports.run_records import Run, best, final_metric, find_runs, swept_keys

SAMPLES = 6  # predictions shown of each split


def write_report(workdir: Path, output: Path) -> Path:
    """Write index.html and the PNGs into `output`; the page's path."""
    runs = find_runs(workdir, SAMPLES)
    groups = swept_keys(runs)
    curves = figures.loss_curves(runs)
    finals, others = figures.final_by_key(runs, groups), figures.metric_curves(runs)
    times = figures.time_split(runs)
    output.mkdir(parents=True, exist_ok=True)
    by_name = {f"loss_by_{axis}": figure for axis, figure in curves.items()}
    for name, figure in (by_name | finals | others | times).items():
        save_png(figure, output / f"{name}.png")
    by_axis = {axis: svg(figure) for axis, figure in curves.items()}
    pictures = [html.tabs("Loss: smoothed, and raw behind; dots are validation", by_axis)]
    pictures += [html.figure("At the end of each run", svg(f)) for f in finals.values()]
    metrics = [html.figure("", svg(figure)) for figure in others.values()]
    if len(runs) == 1:
        pictures, metrics = pictures + metrics, []
    sections = [
        html.tiles(_summary(runs)),
        html.section("Curves", html.figures(pictures)),
        html.section("Runs", _table(runs, groups) if len(runs) > 1 else ""),
        html.section("Incidents", _incidents(runs)),
        html.section("Metrics", html.figures(metrics)),
        html.section("Time", html.figures([_time_card(runs, f) for f in times.values()])),
        html.section("Evaluations", _scores(runs)),
        html.section("Samples", _samples(runs)),
        html.section("Configuration", _configuration(runs, groups)),
    ]
    page = output / "index.html"
    title = workdir.resolve().name
    page.write_text(html.page(title, _lead(runs), sections, len(curves)))
    return page


def _lead(runs: Sequence[Run]) -> str:
    kinds = [(run.config["model.family"], run.config["objective.name"]) for run in runs]
    families = sorted({", ".join(dict.fromkeys(kind)) for kind in kinds})
    sources = sorted({str(run.config["data.source"]) for run in runs})
    count = "One run" if len(runs) == 1 else f"{len(runs)} runs"
    return f"{count}: {'; '.join(families)}; on {'; '.join(sources)}."


def _summary(runs: Sequence[Run]) -> dict[str, str]:
    """The figures that a reader looks for first."""
    metric, chosen = final_metric(runs), best(runs)
    name = metric.removeprefix("eval/").replace("/", " ") if "/" in metric else "training loss"
    seconds = sum(run.total_seconds for run in runs)
    useful = sum(run.clock.get("goodput", 0.0) * run.total_seconds for run in runs)
    found = {}
    if chosen:
        found[f"{'best ' if len(runs) > 1 else ''}{name}"] = f"{chosen.final(metric):.4f}"
    if len(runs) > 1:
        if chosen:
            found["by run"] = chosen.name
        found["finished"] = f"{sum(run.finished for run in runs)} of {len(runs)}"
    else:
        goal = "" if runs[0].finished else f" of {runs[0].config['train.steps']:,}"
        found["steps"] = f"{runs[0].last_step:,}{goal}"
    sized = [run for run in runs if run.size]
    if sized:
        sizes = {run.size.parameters for run in sized if run.size}
        found["parameters"] = " – ".join(short(n) for n in sorted({min(sizes), max(sizes)}))
        found["tokens"] = short(sum(run.tokens or 0 for run in sized))
        found["model FLOPs"] = short(sum(run.flops or 0 for run in sized))
    if seconds:
        found["time"] = duration(seconds)
        found["goodput"] = f"{useful / seconds:.1%}"
    return found


def _table(runs: Sequence[Run], groups: Sequence[tuple[str, ...]]) -> str:
    """A row a run: what it differs in, what it reached, what it took."""
    metric = final_metric(runs)
    metrics = [metric, *_further_metrics(runs, metric)]
    first, *others = (name.removeprefix("eval/") for name in metrics)
    columns = ["run", first, *(group[0] for group in groups), *others]
    columns += ["steps", "parameters", "tokens", "FLOPs", "time", "tokens/s", "goodput"]
    chosen = best(runs)
    rows = []
    for run, color in zip(runs, colors(len(runs)), strict=True):
        speed = run.curves.get("tokens_per_second")
        sizes = run.size and run.size.parameters, run.tokens, run.flops
        rows.append(
            [
                Cell(run.name, color=color),
                _number(run.final(metric), "{:.4f}"),
                *(_value(run.config.get(group[0])) for group in groups),
                *(_number(run.final(name), "{:.4f}") for name in metrics[1:]),
                _number(run.last_step, "{:,}"),
                *(_number(value, short) for value in sizes),
                _number(run.total_seconds or None, duration),
                _number(float(np.nanmedian(speed.values)) if speed else None, short),
                _number(run.clock.get("goodput"), "{:.1%}"),
            ]
        )
    return html.table(columns, rows, runs.index(chosen) if chosen else None)


def _further_metrics(runs: Sequence[Run], metric: str) -> list[str]:
    names = dict.fromkeys(name for run in runs for name in run.evaluations)
    return [name for name in names if name != metric and not name.endswith("/targets")]


def _value(value: Any) -> Cell:
    number = isinstance(value, int | float)
    return Cell(shown(value), float(value) if number else None)


def _number(value: float | None, form: Any) -> Cell:
    if value is None:
        return Cell(shown(None))
    return Cell(form.format(value) if isinstance(form, str) else form(value), float(value))


def _incidents(runs: Sequence[Run]) -> str:
    found = [(run, line) for run in runs for line in incidents(run)]
    named = [f"{run.name}: {line}" if len(runs) > 1 else line for run, line in found]
    return f'<div class="card">{html.bullets(named) or "None."}</div>'


def _time_card(runs: Sequence[Run], figure: Any) -> str:
    starts = sum(run.clock.get("starts", 1) for run in runs)
    return html.figure(f"Where the time went, over {starts} start(s)", svg(figure))


def _scores(runs: Sequence[Run]) -> str:
    rows = [
        {"run": run.name, "evaluation": name, **report}
        for run in runs
        for name, report in run.scores.items()
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_value(row.get(column)) for column in columns] for row in rows]
    return html.table(columns, cells) if rows else ""


def _samples(runs: Sequence[Run]) -> str:
    return "".join(
        html.folded(f"{run.name}, {name}", html.texts(rows))
        if len(runs) > 1
        else f"<h3>{name}</h3>{html.texts(rows)}"
        for run in runs
        for name, rows in run.samples.items()
    )


def _configuration(runs: Sequence[Run], groups: Sequence[tuple[str, ...]]) -> str:
    """Keys in which runs differ, a column a run; and what all set otherwise than the default."""
    keys = [key for group in groups for key in group]
    rows = [[Cell(key), *(_value(run.config.get(key)) for run in runs)] for key in keys]
    differences = html.table(["key", *(run.name for run in runs)], rows) if keys else ""
    title = "What all share and is not the default" if keys else "What is not the default"
    return differences + _from_defaults(runs[0].config, set(keys), title)


def _from_defaults(config: Mapping[str, Any], leave: set[str], title: str) -> str:
    defaults = dict(configs.flatten(configs.default()))
    rows = [
        [Cell(key), _value(value), _value(defaults.get(key))]
        for key, value in config.items()
        if key not in leave and shown(value) != shown(defaults.get(key))
    ]
    return html.folded(title, html.table(["key", "value", "default"], rows)) if rows else ""
