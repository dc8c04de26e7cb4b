"""Plot loss over learning rate, one line per width: standard parametrization and muP.

    python scripts/learning_rate_width.py --workdir runs/rate_width --output FILE.png

The workdir contains the two sweeps of experiments/sweeps/learning_rate_width.py, as `standard` and
`mup`; missing runs are left out. It also prints the best rate of each width.
"""

import argparse
from pathlib import Path

from lm.tools.reports.plotting import save_png, shades, subplots, value_axis
from lm.tools.reports.run_records import VALIDATION_LOSS, find_runs

NAMES = {"standard": "standard parametrization", "mup": "muP, base width 64"}


def best_losses(folder):
    """Return {width: {learning rate: validation loss}} of the finished runs of a sweep."""
    found = {}
    for run in find_runs(folder):
        loss = run.final(VALIDATION_LOSS)
        if run.finished and loss is not None:
            rates = found.setdefault(run.config["model.d_model"], {})
            rates[run.config["optimizer.learning_rate"]] = loss
    return {width: dict(sorted(found[width].items())) for width in sorted(found)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    figure, axes = subplots(1, 2, sharey=True, figsize=(9.5, 3.8))
    for ax, (name, title) in zip(axes, NAMES.items(), strict=True):
        by_width = best_losses(args.workdir / name)
        for (width, losses), color in zip(by_width.items(), shades(len(by_width)), strict=True):
            ax.plot(losses.keys(), losses.values(), "o-", color=color, label=f"d_model {width}")
            rate = min(losses, key=losses.get)
            ax.plot(rate, losses[rate], "*", markersize=14, color=color)
            print(f"{name} d_model={width}: best rate {rate:.4g}, loss {losses[rate]:.4f}")
        ax.set(xlabel="learning rate", title=title)
        value_axis(ax.xaxis, sorted({rate for losses in by_width.values() for rate in losses}))
        ax.legend(frameon=False, fontsize=10)
    axes[0].set_ylabel("validation loss, nats per byte")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_png(figure, args.output)


if __name__ == "__main__":
    main()
