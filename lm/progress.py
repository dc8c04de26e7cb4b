"""Progress bars on stderr, or a line per minute if stderr is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

_SECONDS_A_LINE = 60.0
_LINE = "{desc}: {n_fmt} of {total_fmt} ({percentage:.0f} %), {rate_fmt}, {remaining} left{postfix}"
_LINE_WITHOUT_TOTAL = "{desc}: {n_fmt}, {rate_fmt}, {elapsed} so far{postfix}"


def progress_bar(
    description: str, total: float | None, *, shown: bool = True, **options: Any
) -> tqdm:
    """Return a progress bar: `update(n)`, `close()`, a context manager.

    Args:
        description: what is in progress.
        total: number of units, or None.
        shown: whether to print anything.
        **options: further arguments of tqdm, such as initial, unit and leave.
    """
    options |= {"desc": description, "total": total, "disable": not shown}
    if sys.stderr.isatty():
        return tqdm(file=sys.stderr, dynamic_ncols=True, mininterval=0.5, **options)
    return tqdm(
        file=_Lines(sys.stderr),
        bar_format=_LINE_WITHOUT_TOTAL if total is None else _LINE,
        mininterval=_SECONDS_A_LINE,
        delay=_SECONDS_A_LINE,
        position=0,  # print new lines instead of moving the cursor up
        miniters=1,  # iterations per minute may change; tqdm's own estimate adapts slowly
        **options,
    )


def track(items: Iterable, total: int | None, *, description: str, **options: Any) -> Iterator:
    """Yield items and show their count as progress.

    Args:
        items: items.
        total: number of items, or None.
        description: what is in progress.
        **options: further arguments of `progress_bar`.
    """
    with progress_bar(description, total, **options) as bar:
        for item in items:
            yield item
            bar.update()


class _Lines:
    """Stream that prints tqdm's updates on separate lines."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        if text := text.strip():
            self._stream.write(f"{text}\n")

    def flush(self) -> None:
        self._stream.flush()
