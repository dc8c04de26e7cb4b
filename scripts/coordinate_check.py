"""Plot muP's coordinate check: activations over the width after a few steps.

    python scripts/coordinate_check.py --output experiments/results/mup/coordinates.png
                                       [--widths 64 128 256 512 1024] [--steps 4]

A decoder of two layers on bytes of the standard library, Adam with one learning rate, in the
standard parametrization (above) and in muP with base width 64 (below). Where the lines stay level,
the learning rate transfers between widths (Yang et al. 2022, appendix D.1).
"""

import argparse
from pathlib import Path

import jax

from lm.config import default, set_value
from lm.experiment import build_with_data
from lm.tools.reports.coordinate_check import WATCHED, activation_scales
from lm.tools.reports.plotting import INK, save_png, shades, subplots

BASE, HEADS, RATE = 64, 4, 1e-2
MODEL = {
    "model.n_layers": 2,
    "model.n_heads": HEADS,
    "model.norm": "rmsnorm",
    "model.positions": "rotary",
    "data.sequence_length": 64,
    "data.batch_size": 8,
    "parallel.mesh.data": 1,
    "optimizer.learning_rate": RATE,
    "schedule.name": "constant",
    "train.scan_unroll": 0,
}


def config_of(width, mup):
    config = default()
    base = {"model.mup_base_width": BASE, "model.mup_base_head_dim": BASE // HEADS} if mup else {}
    for path, value in (MODEL | base | {"model.d_model": width}).items():
        set_value(config, path, value)
    return config


def first_batch():
    """Return the first training batch, which is the same at every width."""
    experiment, dataset = build_with_data(config_of(BASE, False), jax.devices()[:1])
    return experiment.train_batches(dataset).rows(0, range(experiment.config.data.batch_size))


def draw(measured, widths, steps):
    """Plot the parametrizations in rows and the outputs in columns, one line per step."""
    figure, axes = subplots(2, len(WATCHED), figsize=(9.5, 5.6), sharex=True, sharey="col")
    for row, (name, by_width) in zip(axes, measured.items(), strict=True):
        for ax, what in zip(row, WATCHED, strict=True):
            for step, color in enumerate(shades(steps + 1)):
                values = [by_width[width][what][step] for width in widths]
                ax.plot(widths, values, "o-", markersize=3.5, color=color, label=f"{step} steps")
            ax.set(xscale="log", yscale="log", title=f"{what}, {name}")
            ax.title.set(fontsize=11, color=INK)
            ax.set_xticks(widths, widths)
            ax.minorticks_off()
        row[0].set_ylabel("mean |activation|")
    for ax in axes[1]:
        ax.set_xlabel("d_model")
    axes[1][0].legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    batch, measured = first_batch(), {}
    for name, mup in {"standard": False, "muP": True}.items():
        measured[name] = {}
        for width in args.widths:
            scales = activation_scales(config_of(width, mup), batch, args.steps)
            measured[name][width] = scales
            print(name, width, {what: f"{values[-1]:.4g}" for what, values in scales.items()})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_png(draw(measured, args.widths, args.steps), args.output)


if __name__ == "__main__":
    main()
