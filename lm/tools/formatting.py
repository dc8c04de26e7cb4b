"""Numbers, durations and tables as text."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text


def short(value: float) -> str:
    """Format with three digits and a unit, as 12.3M or 4.56e20; no unit below a thousand."""
    if not math.isfinite(value) or not value:
        return f"{value:g}"
    if 1e3 <= abs(value) < 1e15:
        unit = int(math.log10(abs(float(f"{value:.3g}"))) // 3)
        return f"{value / 1000**unit:.3g}" + " kMBT"[unit]
    return f"{value:.3g}".replace("e+", "e").replace("e-0", "e-")


def duration(seconds: float) -> str:
    """Format a duration in its two largest units: 3 h 25 min, 4 min 10 s, 8.3 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def shown(value: Any) -> str:
    """Format a configuration value or table cell; None is a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value) if value != "" else "none"


def printable(text: str) -> str:
    r"""Replace unprintable characters, such as partial bytes, by \ufffd."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def text_table(
    rows: Iterable[Sequence[str]], columns: Sequence[str] = (), right: Collection[int] = ()
) -> Table:
    """Build a table without lines, with two spaces between columns.

    Args:
        rows: Cells of each row; all rows have equal length.
        columns: Column titles; no header if empty.
        right: Indices of right-aligned columns.
    """
    cells = [[Text(cell) for cell in row] for row in rows]  # in a Text, "[…]" is not markup
    table = Table(box=None, show_header=bool(columns), pad_edge=False, padding=(0, 2, 0, 0))
    for i in range(max(map(len, cells), default=len(columns))):
        title = columns[i] if columns else ""
        table.add_column(Text(title), justify="right" if i in right else "left")
    for row in cells:
        table.add_row(*row)
    return table


def plain_text(renderable: RenderableType, indent: int = 0) -> str:
    """Render without color or wrapping, with every line indented by `indent` spaces."""
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    lines = captured.get().rstrip("\n").split("\n")
    return "\n".join((" " * indent + line).rstrip() for line in lines)
