"""Numbers as people read them."""

from __future__ import annotations

import math
from typing import Any


def short(value: float) -> str:
    """Three digits and a unit: 12.3M, 4.56e20; below a thousand as it is."""
    if not math.isfinite(value) or not value:
        return f"{value:g}"
    if 1e3 <= abs(value) < 1e15:
        unit = int(math.log10(abs(float(f"{value:.3g}"))) // 3)
        return f"{value / 1000**unit:.3g}" + " kMBT"[unit]
    return f"{value:.3g}".replace("e+", "e").replace("e-0", "e-")


def duration(seconds: float) -> str:
    """A time in the two units that say it: 3 h 25 min, 4 min 10 s, 8.3 s."""
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
    """A value of a configuration or a table."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value) if value != "" else "none"
