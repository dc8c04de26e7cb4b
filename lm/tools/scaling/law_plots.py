"""Pictures of a scaling law: IsoFLOP parabolas, the fit against the runs, the optimal sizes."""

from __future__ import annotations

from typing import Any

import numpy as np

from lm.tools.reports.numbers import short
from lm.tools.reports.plotting import INK, colors, count_axis, legend, shades, subplots
from lm.tools.scaling.isoflop import PowerLaw, Profile
from lm.tools.scaling.law import Law
from lm.tools.scaling.run_table import Runs


def isoflop_profiles(found: list[Profile]) -> Any:
    """Loss over model size at each budget, with parabolas and their minima."""
    figure, axes = subplots()
    for profile, color in zip(found, shades(len(found)), strict=True):
        n, loss = profile.runs.n, profile.runs.loss
        line = np.geomspace(n.min(), n.max(), 100)
        label = f"{short(profile.flop)} FLOPs"
        axes.plot(n, loss, "o", markersize=4.5, color=color, alpha=0.75)
        axes.plot(line, np.polyval(profile.parabola, np.log(line)), color=color, label=label)
        if profile.has_minimum:
            axes.plot(profile.n, profile.loss, "*", markersize=13, color=color, markeredgecolor=INK)
    count_axis(axes.xaxis)
    axes.set(xlabel="parameters N", ylabel="loss, nats a token")
    legend(axes, len(found), outside=True)
    return figure


def fitted_losses(runs: Runs, law: Law) -> Any:
    """The fitted loss of each run against its loss."""
    figure, axes = subplots()
    flop = np.log10(runs.flop)
    ends = [runs.loss.min(), runs.loss.max()]
    axes.plot(ends, ends, color=INK, linewidth=1)
    dots = axes.scatter(runs.loss, law.loss(runs.n, runs.d), c=flop, s=22, cmap="viridis")
    figure.colorbar(dots, label="log₁₀ FLOPs")
    axes.set(xlabel="loss of the run, nats a token", ylabel="loss by the law")
    return figure


def optimal_sizes(
    runs: Runs, law: Law, found: list[Profile], power: PowerLaw | None, budgets: list[float]
) -> Any:
    """Compute-optimal N over FLOPs, by the law and by the minima of the parabolas."""
    figure, axes = subplots()
    ends = [runs.flop.min(), max([runs.flop.max(), *budgets])]
    flop = np.geomspace(ends[0], ends[1], 50)
    label = f"L(N, D): N ∝ C^{law.exponent:.3f}"
    axes.plot(flop, [law.optimum(c)[0] for c in flop], color=colors(2)[0], label=label)
    minima = [profile for profile in found if profile.has_minimum]
    axes.plot([p.flop for p in minima], [p.n for p in minima], "*", markersize=11, color=INK)
    if power:
        label = f"parabolas: N ∝ C^{power.exponent:.3f}"
        axes.plot(flop, [power.n(c) for c in flop], "--", color=colors(2)[1], label=label)
    for budget in budgets:
        axes.plot(budget, law.optimum(budget)[0], "o", markersize=8, color=colors(1)[0])
    axes.plot(runs.flop, runs.n, ".", color=INK, alpha=0.2, zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs C", ylabel="parameters N")
    legend(axes, 2)
    return figure
