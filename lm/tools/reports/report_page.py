"""`lm report`: one self-contained page, and PNGs of its figures, of a run or a folder of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm import config as configs
from lm.errors import missing_package
from lm.tools.formatting import duration, short, shown
from lm.tools.reports import run_plots
from lm.tools.reports.plotting import colors, save_png, svg
from lm.tools.reports.run_records import (
    RunRecord,
    best_run,
    final_metric,
    find_runs,
    incidents,
    swept_keys,
)

N_SAMPLES = 6  # predictions shown of each split
TEMPLATE = "page.html"


class Cell(NamedTuple):
    """Table cell: text, value that it is sorted by (None: the text; "": last), color of a dot."""

    text: str
    value: float | str | None = None
    color: str = ""


def write_page(workdir: Path, output: Path) -> Path:
    """Write index.html and the PNGs into `output`; return the path of the page.

    Raises:
        UserError: There is no run in `workdir`, or the extra "report" is not installed.
    """
    template, runs = _template(), find_runs(workdir, N_SAMPLES)
    groups = swept_keys(runs)
    several = len(runs) > 1
    loss = run_plots.loss_curves(runs)
    finals, metrics = run_plots.final_by_key(runs, groups), run_plots.metric_curves(runs)
    time = run_plots.time_split(runs)
    output.mkdir(parents=True, exist_ok=True)
    by_name = {f"loss_by_{axis}": figure for axis, figure in loss.items()} | finals | metrics
    for name, figure in (by_name | ({"time": time} if time else {})).items():
        save_png(figure, output / f"{name}.png")
    keys = [key for group in groups for key in group]
    text = template.render(
        title=workdir.resolve().name,
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
        differences=_differences(runs, keys),
        changed=_changed(runs[0], keys),
    )
    page = output / "index.html"
    page.write_text(text)
    return page


def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise missing_package("the report page", "jinja2", "report") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names and texts of runs are not markup
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(TEMPLATE)


def _lead(runs: Sequence[RunRecord]) -> str:
    kinds = [(run.config["model.family"], run.config["objective.name"]) for run in runs]
    families = sorted({", ".join(dict.fromkeys(kind)) for kind in kinds})
    sources = sorted({str(run.config["data.source"]) for run in runs})
    count = "One run" if len(runs) == 1 else f"{len(runs)} runs"
    return f"{count}: {'; '.join(families)}; on {'; '.join(sources)}."


def _summary(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Return the figures that a reader looks for first, by their captions."""
    metric, best = final_metric(runs), best_run(runs)
    name = metric.removeprefix("eval/").replace("/", " ") if "/" in metric else "training loss"
    seconds = sum(run.total_seconds for run in runs)
    useful = sum(run.clock.get("goodput", 0.0) * run.total_seconds for run in runs)
    tiles = {}
    if best:
        tiles[f"{'best ' if len(runs) > 1 else ''}{name}"] = f"{best.final(metric):.4f}"
    if len(runs) > 1:
        if best:
            tiles["by run"] = best.name
        tiles["finished"] = f"{sum(run.finished for run in runs)} of {len(runs)}"
    else:
        goal = "" if runs[0].finished else f" of {runs[0].config['train.steps']:,}"
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
    """Return a row a run: the keys in which runs differ, metrics, sizes and time."""
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
                _number(run.final(metric), "{:.4f}".format),
                *(_value(run.config.get(group[0])) for group in groups),
                *(_number(run.final(name), "{:.4f}".format) for name in metrics),
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
    return Cell(shown(value), float(value) if isinstance(value, int | float) else None)


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


def _differences(runs: Sequence[RunRecord], keys: Sequence[str]) -> dict[str, Any] | None:
    """Return the keys in which runs differ, one column a run."""
    rows = [[Cell(key), *(_value(run.config.get(key)) for run in runs)] for key in keys]
    return {"columns": ["key", *(run.name for run in runs)], "rows": rows} if keys else None


def _changed(run: RunRecord, leave: Sequence[str]) -> dict[str, Any] | None:
    """Return the keys of a run that differ from their default, without those of `leave`."""
    defaults = dict(configs.flatten(configs.default()))
    rows = [
        [Cell(key), _value(value), _value(defaults.get(key))]
        for key, value in run.config.items()
        if key not in leave and shown(value) != shown(defaults.get(key))
    ]
    return {"columns": ["key", "value", "default"], "rows": rows} if rows else None
