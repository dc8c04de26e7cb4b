"""What `lm scaling` does: the law of a set of runs, optima and forecasts, as a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lm.tools.reports.numbers import short
from lm.tools.reports.plotting import save_png
from lm.tools.scaling import isoflop
from lm.tools.scaling import law_plots as figures
from lm.tools.scaling.law import Law, bootstrap, fit, interval
from lm.tools.scaling.run_table import Runs


def enough_tokens(runs: Runs, least: float) -> Runs:
    """The runs of at least so many tokens a parameter; the others hardly left initialisation."""
    return runs[runs.d / runs.n >= least]


def study(
    runs: Runs, budgets: list[float], resamples: int, seed: int, output: Path | None
) -> dict[str, Any]:
    """E, A, B, alpha, beta with 95 % `intervals`, `isoflop` minima, and `budgets`' optima.

    With `output`, PNGs in that folder too.
    """
    law = fit(runs)
    laws = bootstrap(runs, law, resamples, seed)
    found = isoflop.profiles(runs)
    power = isoflop.power_law(found)
    exponents = isoflop.bootstrap_exponents(found, resamples, seed) if power else []
    if output:
        output.mkdir(parents=True, exist_ok=True)
        pictures = {
            "isoflop.png": figures.isoflop_profiles(found),
            "fit.png": figures.fitted_losses(runs, law),
            "optimum.png": figures.optimal_sizes(runs, law, found, power, budgets),
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
    power: isoflop.PowerLaw | None,
    flop: float,
    seed: int,
) -> dict[str, Any]:
    """The compute-optimal `n` and `d` of a budget and the `loss` of a run of them, with intervals.

    The loss's interval holds the uncertainty of the law and the scatter of single runs about it.
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


def _minimum(profile: isoflop.Profile) -> dict[str, float]:
    return {"n": profile.n, "d": profile.flop / (6 * profile.n), "loss": profile.loss}


def text(report: dict[str, Any]) -> str:
    """The report for a reader."""
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
