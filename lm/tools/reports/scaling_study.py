"""`lm scaling`: scaling laws of a set of runs, optima and forecasts for budgets, and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lm.tools.formatting import short
from lm.tools.reports.plotting import INK, colors, count_axis, legend, save_png, shades, subplots
from lm.tools.reports.scaling_law import (
    Law,
    PowerLaw,
    Profile,
    Runs,
    bootstrap,
    bootstrap_exponents,
    fit_law,
    interval,
    isoflop_profiles,
    power_law,
)


def enough_tokens(runs: Runs, least: float) -> Runs:
    """Select runs with at least `least` tokens per parameter."""
    return runs[runs.d / runs.n >= least]


def study(
    runs: Runs, budgets: list[float], resamples: int, seed: int, output: Path | None
) -> dict[str, Any]:
    """Fit both kinds of scaling law and forecast the best run of each budget.

    Args:
        runs: Runs to fit.
        budgets: FLOPs of the runs to forecast.
        resamples: Bootstrap resamples for the intervals.
        seed: Seed of the resamples.
        output: Folder for PNGs; None for none.

    Returns:
        What `lm scaling --json` prints: E, A, B, alpha, beta with 95 % `intervals`, minima of
        `isoflop` profiles, and optima for `budgets`.
    """
    law = fit_law(runs)
    laws = bootstrap(runs, law, resamples, seed)
    found = isoflop_profiles(runs)
    power = power_law(found)
    exponents = bootstrap_exponents(found, resamples, seed) if power else []
    if output:
        output.mkdir(parents=True, exist_ok=True)
        pictures = {
            "isoflop.png": isoflop_curves(found),
            "fit.png": fitted_losses(runs, law),
            "optimum.png": optimal_sizes(runs, law, found, power, budgets),
        }
        for name, figure in pictures.items():
            save_png(figure, output / name)
    return {
        **law._asdict(),
        "intervals": {
            **{name: interval(values) for name, values in _columns(laws).items()},
            "exponent": interval([one.exponent for one in laws]),
        },
        "standard_errors": {name: float(np.std(v)) for name, v in _columns(laws).items()},
        "exponent": law.exponent,
        "runs": len(runs),
        "isoflop": {
            "exponent": power.exponent if power else None,
            "interval": interval(exponents) if exponents else None,
            "profiles": [
                {"flop": p.flop, "runs": len(p.runs)} | (_minimum(p) if p.has_minimum else {})
                for p in found
            ],
        },
        "budgets": [forecast(runs, law, laws, power, budget, seed) for budget in budgets],
    }


def forecast(
    runs: Runs,
    law: Law,
    laws: list[Law],
    power: PowerLaw | None,
    flop: float,
    seed: int,
) -> dict[str, Any]:
    """Return the compute-optimal `n` and `d` for a budget, and the `loss` of such a run.

    Args:
        runs: Runs that the law was fitted to.
        law: The fitted law.
        laws: Bootstrap resamples of the law, for the intervals.
        power: Power law of the IsoFLOP minima, or None.
        flop: The budget.
        seed: Seed of the scatter. The interval of the loss covers the uncertainty of the law and
            the scatter of single runs around it.
    """
    n, d = law.optimum(flop)
    optima = np.array([one.optimum(flop) for one in laws])
    scatter = np.log(runs.loss) - np.log(law.loss(runs.n, runs.d))
    drawn = np.random.default_rng(seed).choice(scatter, len(laws))
    losses = np.array([float(one.loss(n, d)) for one in laws]) * np.exp(drawn)
    return {
        **{"flop": flop, "n": n, "d": d, "loss": float(law.loss(n, d))},
        "intervals": {
            "n": interval(optima[:, 0]),
            "d": interval(optima[:, 1]),
            "loss": interval(losses),
        },
        "isoflop_n": power.n(flop) if power else None,
    }


def _minimum(profile: Profile) -> dict[str, float]:
    return {"n": profile.n, "d": profile.flop / (6 * profile.n), "loss": profile.loss}


def study_text(report: dict[str, Any]) -> str:
    """Format the result of `study` as lines of text."""
    lines = [f"L(N, D) = E + A/N^alpha + B/D^beta of {report['runs']} runs; 95 % intervals"]
    for name in Law._fields:
        low, high = report["intervals"][name]
        lines.append(f"  {name:5} {report[name]:10.5g}   [{low:.5g}, {high:.5g}]")
    low, high = report["intervals"]["exponent"]
    lines.append(f"N_opt ∝ C^{report['exponent']:.3f} [{low:.3f}, {high:.3f}] by the law")
    curves = report["isoflop"]
    if curves["exponent"]:
        low, high = curves["interval"]
        minima = sum("n" in p for p in curves["profiles"])
        lines.append(
            f"N_opt ∝ C^{curves['exponent']:.3f} [{low:.3f}, {high:.3f}] by the minima of "
            f"{minima} IsoFLOP parabolas"
        )
    for budget in report["budgets"]:
        spans = {k: f"[{short(lo)}, {short(hi)}]" for k, (lo, hi) in budget["intervals"].items()}
        low, high = budget["intervals"]["loss"]
        loss = f"loss {budget['loss']:.4f} [{low:.4f}, {high:.4f}]"
        other = f"; {short(budget['isoflop_n'])} by parabolas" if budget["isoflop_n"] else ""
        lines.append(
            f"{short(budget['flop'])} FLOPs: N {short(budget['n'])} {spans['n']}{other}, "
            f"D {short(budget['d'])} {spans['d']}, {loss}"
        )
    return "\n".join(lines)


def _columns(laws: list[Law]) -> dict[str, list[float]]:
    return dict(zip(Law._fields, map(list, zip(*laws, strict=True)), strict=True))


def isoflop_curves(found: list[Profile]) -> Any:
    """Plot loss over model size at each budget, with parabolas and their minima."""
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
    axes.set(xlabel="parameters N", ylabel="loss, nats per token")
    legend(axes, len(found), outside=True)
    return figure


def fitted_losses(runs: Runs, law: Law) -> Any:
    """Plot the fitted loss of each run over its loss."""
    figure, axes = subplots()
    flop = np.log10(runs.flop)
    ends = [runs.loss.min(), runs.loss.max()]
    axes.plot(ends, ends, color=INK, linewidth=1)
    dots = axes.scatter(runs.loss, law.loss(runs.n, runs.d), c=flop, s=22, cmap="viridis")
    figure.colorbar(dots, label="log₁₀ FLOPs")
    axes.set(xlabel="loss of the run, nats per token", ylabel="loss by the law")
    return figure


def optimal_sizes(
    runs: Runs, law: Law, found: list[Profile], power: PowerLaw | None, budgets: list[float]
) -> Any:
    """Plot compute-optimal N over FLOPs, by the law and by the minima of the parabolas.

    Args:
        runs: Runs that were fitted.
        law: Parametric law.
        found: IsoFLOP profiles.
        power: Power law of their minima, if there is one.
        budgets: FLOPs whose optima are marked.
    """
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
