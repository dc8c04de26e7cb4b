"""The look of every figure, and figures as SVG text and PNG files.

Figures are small with large letters, so that they stay readable on a telephone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm.errors import UserError

INK, FAINT = "#1f2430", "#d9dde5"
COLORS = (
    *("#2f6fdb", "#e4572e", "#2a9d6f", "#9b5de5", "#d99a00", "#00a3b4"),
    *("#c2417c", "#6b7280", "#7a9e1f", "#8d5a3b"),
)
STYLE = {
    "figure.figsize": (6.4, 4.0),
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 12,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "lines.linewidth": 1.9,
    "svg.fonttype": "none",
    "svg.hashsalt": "lm",
}


def colors(count: int) -> list[str]:
    """A colour for each of so many runs: ten that differ well, or else steps of one scale."""
    return list(COLORS[:count]) if count <= len(COLORS) else shades(count)


def shades(count: int) -> list[str]:
    """So many steps of one scale, for what has an order."""
    matplotlib = _matplotlib()
    scale = matplotlib.colormaps["viridis"]
    return [matplotlib.colors.to_hex(scale(0.92 * i / max(1, count - 1))) for i in range(count)]


def subplots(**options: Any) -> tuple[Any, Any]:
    """A figure in the house style and its axes; UserError without matplotlib."""
    matplotlib = _matplotlib()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(**options)
        return figure, figure.subplots()


def legend(axes: Any, entries: int, outside: bool = False) -> None:
    """A legend where it hides least, or beside; none for one entry or, inside, for many."""
    if outside and entries > 8:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    elif 1 < entries <= 8:
        axes.legend(loc="best", frameon=False, fontsize=10.5)


def value_axis(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis where positive values span most of a decade; their own ticks if few."""
    matplotlib = _matplotlib()
    low, high = min(values), max(values)
    if low > 0 and high / low >= 5:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    if len(set(values)) <= 6:
        axis.set_major_locator(matplotlib.ticker.FixedLocator(sorted(set(values))))
        axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:.4g}"))
        axis.set_minor_locator(matplotlib.ticker.NullLocator())


def svg(figure: Any) -> str:
    """The figure as an <svg> element that takes its width from the page."""
    stream = io.StringIO()
    with _matplotlib().rc_context(STYLE):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(
        r'<svg ([^>]*?)height="[^"]*" ([^>]*?)width="[^"]*"', r"<svg \1 \2", text, count=1
    )


def save_png(figure: Any, file: Path) -> None:
    with _matplotlib().rc_context(STYLE):
        figure.savefig(file, dpi=160)


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        message = "figures need the package `matplotlib`: pip install 'lm[report]'"
        raise UserError(message) from error
    return matplotlib
