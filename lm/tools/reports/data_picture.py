"""Plot of a data set: document lengths, and token frequencies by rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lm.data.statistics import StoreStatistics
from lm.errors import UserError
from lm.tools.reports.plotting import colors, legend, plain, subplots

_BINS = 40


def draw_data(found: Sequence[StoreStatistics], file: Path) -> None:
    """Plot statistics of stores.

    Args:
        found: statistics of each store.
        file: .png or .svg file to write.

    Raises:
        UserError: matplotlib is not installed, or the file suffix is not supported.
    """
    if file.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"{file}: the picture must end in .png or .svg")
    figure, (left, right) = subplots(1, 2, figsize=(11.2, 3.8))
    rows = [(each, column) for each in found for column in each.lengths]
    for (each, column), color in zip(rows, colors(len(rows)), strict=True):
        lengths = np.maximum(each.lengths[column], 1)
        edges = np.geomspace(lengths.min(), lengths.max() + 1, _BINS + 1)
        share = np.histogram(lengths, edges)[0] / len(lengths)
        name = f"{each.split} {each.source}" + (f" {column}" if len(each.lengths) > 1 else "")
        left.stairs(100 * share, edges, color=color, label=plain(name))
    for each, color in zip(found, colors(len(found)), strict=True):
        counts = np.sort(each.counts[each.counts > 0])[::-1]
        right.plot(np.arange(1, len(counts) + 1), counts / counts.sum(), color=color)
    left.set(xscale="log", xlabel="tokens of a document", ylabel="% of documents")
    right.set(xscale="log", yscale="log", xlabel="rank of a token", ylabel="share of tokens")
    legend(left, len(rows))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
