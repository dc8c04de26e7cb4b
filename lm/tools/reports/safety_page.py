"""Trend of safety metrics over a run's checkpoints, as a self-contained page."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from lm.config.registries import SAFETY_SETS
from lm.errors import UserError
from lm.evaluation.safety.suite import PREFIX
from lm.storage import parse_json, read_json
from lm.tools.formatting import printable
from lm.tools.html_pages import page_template
from lm.tools.reports.plotting import FAINT, INK, colors, legend, plain, subplots, svg

TEMPLATE = Path(__file__).with_name("safety_page.html")
_MOST_CURVES = 8  # per figure; the table has all

Trend = dict[str, dict[int, float]]  # values by step, by metric name without PREFIX


def write_safety_page(workdir: Path, folder: Path) -> Path:
    """Write index.html with a run's safety metrics to a folder; return its path.

    Raises:
        UserError: the extra "report" is not installed.
    """
    template, trend = page_template(TEMPLATE), read_trend(workdir, folder)
    steps = sorted({step for values in trend.values() for step in values})
    names = list(dict.fromkeys(name.partition("/")[0] for name in trend))
    text = template.render(
        title=f"Safety of {printable(workdir.resolve().name)}",
        tiles=_tiles(trend, steps),
        steps=steps,
        sets=[_section(name, trend, steps) for name in names],
    )
    page = folder / "index.html"
    page.write_bytes(text.encode(errors="replace"))
    return page


def read_trend(workdir: Path, folder: Path) -> Trend:
    """Read the metrics in metrics.jsonl and in the files STEP.json, which take precedence."""
    rows = []
    metrics = workdir / "metrics.jsonl"
    for line in metrics.read_bytes().splitlines() if metrics.is_file() else ():
        if PREFIX.encode() in line:
            rows.append(_row(lambda line=line: parse_json(line, metrics)))
    for file in sorted(folder.glob("*.json")):
        if file.stem.isdigit():
            rows.append(_row(lambda file=file: read_json(file)))
    trend: Trend = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(PREFIX) and isinstance(value, int | float):
                trend.setdefault(printable(name.removeprefix(PREFIX)), {})[row["step"]] = value
    return trend


def _row(read: Any) -> dict[str, Any]:
    """Parse a line of metrics; {} if it is damaged."""
    try:
        row = read()
    except UserError:
        return {}
    return row if type(row.get("step")) is int else {}


def _tiles(trend: Trend, steps: list[int]) -> dict[str, str]:
    tiles = {"checkpoints": str(len(steps)), "newest step": f"{steps[-1]:,}"}
    shown: Counter[str] = Counter()
    for name, values in trend.items():
        of_set = name.partition("/")[0]
        if name.count("/") > 1 or steps[-1] not in values or _is_count(name) or shown[of_set] > 1:
            continue
        shown[of_set] += 1
        tiles[name.replace("/", " ").replace("_", " ")] = f"{values[steps[-1]]:.4g}"
    return tiles


def _is_count(name: str) -> bool:
    """Return whether a metric is a count, or the fraction of ties."""
    words = name.partition("/")[2].replace("/", "_").split("_")
    return not {"pairs", "samples", "equal", "candidates"}.isdisjoint(words)


def _section(name: str, trend: Trend, steps: list[int]) -> dict[str, Any]:
    """Return the page's section on a set: curves of its main metrics, and a table of all."""
    own = {k.partition("/")[2]: v for k, v in trend.items() if k.partition("/")[0] == name}
    cls = SAFETY_SETS.get(name)
    chosen = cls.curves if cls else ()
    curves = {k: v for k, v in own.items() if k in chosen}
    if not chosen:
        curves = {k: v for k, v in own.items() if "/" not in k and not _is_count(f"{name}/{k}")}
    curves = dict(list((curves or own).items())[:_MOST_CURVES])
    figure, axes = subplots()
    for (label, values), color in zip(curves.items(), colors(len(curves)), strict=True):
        x, y = zip(*sorted(values.items()), strict=True)
        axes.plot(x, y, "o-", markersize=5, color=color, label=plain(label.replace("_", " ")))
    if cls and not math.isnan(cls.ideal):
        axes.axhline(cls.ideal, color=INK, linewidth=0.9, linestyle=":")
    for value in cls.published.values() if cls else ():
        axes.axhline(value, color=FAINT, linewidth=1.2)
    axes.set(xlabel="step")
    if len(steps) <= 8:
        axes.set_xticks(steps)
    legend(axes, len(curves))
    return {
        "name": name.replace("_", " "),
        "about": cls.about if cls else "",
        "published": cls.published if cls else {},
        "figure": svg(figure),
        "rows": [(key, [values.get(step) for step in steps]) for key, values in own.items()],
    }
