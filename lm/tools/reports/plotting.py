"""Style of all figures, and their output as SVG and PNG.

Figures are small with large letters, so that they are readable on a phone.
"""

from __future__ import annotations

import base64
import colorsys
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm.errors import missing_package
from lm.tools.formatting import printable, short

INK, FAINT = "#1f2430", "#d9dde5"
COLORS = (
    *("#2f6fdb", "#e4572e", "#2a9d6f", "#9b5de5", "#d99a00", "#00a3b4"),
    *("#c2417c", "#6b7280", "#7a9e1f", "#8d5a3b"),
)
GOLDEN_RATIO = 0.618034  # its multiples modulo 1 are far from each other
WIDTH = 5.6  # inches
LONGEST_LABEL = 48
STYLE = {
    "figure.figsize": (WIDTH, 3.8),
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
    """Return `count` distinct colors; the first ones do not depend on `count`."""
    more = range(max(count - len(COLORS), 0))
    hsv = [(0.08 + i * GOLDEN_RATIO % 1, (0.85, 0.5)[i % 2], (0.75, 0.5)[i // 2 % 2]) for i in more]
    return [*COLORS[:count], *(_rgb(*color) for color in hsv)]


def _rgb(*hsv: float) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hsv_to_rgb(*hsv))


def shades(count: int) -> list[str]:
    """Return `count` shades of one color scale, for ordered values."""
    matplotlib = _matplotlib()
    scale = matplotlib.colormaps["viridis"]
    return [matplotlib.colors.to_hex(scale(0.92 * i / max(1, count - 1))) for i in range(count)]


def subplots(
    rows: int = 1,
    columns: int = 1,
    sharex: bool = False,
    sharey: bool | str = False,
    **options: Any,
) -> tuple[Any, Any]:
    """Create a figure in this style and its axes, like `matplotlib.pyplot.subplots`.

    Args:
        rows: Rows of axes.
        columns: Columns of axes.
        sharex: Whether all x axes are shared.
        sharey: Whether all y axes are shared; "row" or "col": within a row or column.
        options: Options of the figure.

    Raises:
        UserError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(**options)
        return figure, figure.subplots(rows, columns, sharex=sharex, sharey=sharey)


def plain(text: str) -> str:
    """Escape a text for literal display: "$" starts no formula, a leading "_" hides nothing."""
    text = printable(text if len(text) <= LONGEST_LABEL else f"…{text[1 - LONGEST_LABEL :]}")
    return (" " + text if text.startswith("_") else text).replace("$", r"\$")


def legend(axes: Any, entries: int, outside: bool = False) -> None:
    """Add a legend inside the axes for 2 to 8 entries, or outside for more if `outside`."""
    if outside and entries > 8:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    elif 1 < entries <= 8:
        axes.legend(loc="best", frameon=False, fontsize=10.5)


def value_axis(axis: Any, values: Sequence[float]) -> None:
    """Use a logarithmic axis if positive values span a factor of 5; few values get ticks."""
    matplotlib = _matplotlib()
    low, high = min(values), max(values)
    if low > 0 and high / low >= 5:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    marks = np.unique(values)
    positions = axis.get_transform().transform(marks)
    if 1 < len(marks) <= 6 and np.diff(positions).min() > 0.08 * np.ptp(positions):
        axis.set_major_locator(matplotlib.ticker.FixedLocator(marks))
        axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:.4g}"))
        axis.set_minor_locator(matplotlib.ticker.NullLocator())


def count_axis(axis: Any) -> None:
    """Use a logarithmic axis for large numbers, with ticks at 1, 2 and 5 times powers of ten."""
    ticker = _matplotlib().ticker
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(ticker.LogLocator(10, (1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_locator(ticker.NullLocator())


def time_axis(axis: Any) -> None:
    """Set the ticks of an axis of seconds, in seconds, minutes or hours depending on its range."""
    ticker = _matplotlib().ticker
    longest = axis.get_view_interval()[1]
    unit, name = (3600, "h") if longest > 7200 else (60, "min") if longest > 120 else (1, "s")
    axis.set_major_locator(
        ticker.FixedLocator(unit * ticker.MaxNLocator(6).tick_values(0, longest / unit))
    )
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value / unit:g} {name}"))


class SvgText(str):
    """SVG element; Jinja does not escape it."""

    def __html__(self) -> str:
        return self


def svg(figure: Any) -> SvgText:
    """Render the figure as an <svg> element that takes its width from the page."""
    stream = io.StringIO()
    _save(figure, stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    return SvgText(re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest)


def gray_png(values: np.ndarray) -> str:
    """Return a data URL of a grayscale picture [height, width], uint8."""
    _matplotlib()  # depends on Pillow
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def save_png(figure: Any, file: Path) -> None:
    """Write the figure as a PNG file."""
    _save(figure, file, dpi=160)


def _save(figure: Any, target: Any, **options: Any) -> None:
    with _matplotlib().rc_context(STYLE), warnings.catch_warnings():
        # Names may be in any script; a page shows them, a PNG may show boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(target, **options)


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise missing_package("a figure", "matplotlib", "report") from error
    return matplotlib
