"""Compare the optimizers of experiments/speedrun.py by their steps to a validation loss.

    python scripts/speedrun.py --output FILE.jsonl [--only VARIANT …] [--factors 1 0.5 2]

Every variant runs at its learning rate times each factor with seed 0; then the best variants run at
their best rate with further seeds. FILE gets one line per run, and runs that are already in it are
not repeated. At the end, the script prints a Markdown table of all runs in FILE; with --factors and
no number, it only prints the table. CPU seconds are those of training steps, over all threads of
the process, without compilation and evaluation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax

from lm.config import load_config
from lm.config.experiment_file import execute
from lm.data.batches import to_device
from lm.evaluation.loss import evaluate_loss
from lm.experiment import build_with_data
from lm.training.trainer import dispatches

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "speedrun.py"


def race(variant: str, factor: float, seed: int) -> dict[str, Any]:
    """Train a variant to its last step; return its curve: step, processor seconds, loss."""
    config = load_config(f"{EXPERIMENT}:{variant}")
    config.optimizer.learning_rate *= factor
    config.seed = seed
    experiment, dataset = build_with_data(config, jax.devices()[:1])
    config = experiment.config
    batches = experiment.train_batches(dataset)
    validation = experiment.evaluation_batches(dataset.validation), dataset.validation
    state, program = experiment.init_state(), None
    seconds, curve = 0.0, []
    for steps in dispatches(0, config):
        batch = to_device(batches, steps, experiment.batch_sharding)
        program = program or experiment.train_steps.lower(state, batch).compile()
        start = time.process_time()
        state, metrics = program(state, batch)
        jax.block_until_ready(metrics)
        seconds += time.process_time() - start
        figures = evaluate_loss(
            experiment, state.inference_params, *validation, config.eval.max_batches
        )
        curve.append((steps.stop, round(seconds, 1), round(figures["loss"], 4)))
    rate = float(f"{config.optimizer.learning_rate:.3g}")
    return {"variant": variant, "rate": rate, "seed": seed, "curve": curve}


def last_loss(run: dict[str, Any]) -> float:
    return run["curve"][-1][2]


def best_runs(runs: list[dict[str, Any]], variant: str) -> list[dict[str, Any]]:
    """Return a variant's runs at the rate with the lowest last loss on seed 0."""
    own = [run for run in runs if run["variant"] == variant]
    best = min((run for run in own if run["seed"] == 0), key=last_loss)
    return [run for run in own if run["rate"] == best["rate"]]


def ranked(runs: list[dict[str, Any]]) -> list[str]:
    """Return the variants by mean last loss, lowest first."""
    means = {
        run["variant"]: statistics.mean(map(last_loss, best_runs(runs, run["variant"])))
        for run in runs
    }
    return sorted(means, key=means.__getitem__)


def table(runs: list[dict[str, Any]], target: float) -> str:
    """Format the runs at the best rate of each variant as a Markdown table."""
    lines = [
        f"| optimizer | rates tried | best | seeds | steps to {target} | processor s to it "
        "| processor s of a run | last loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in ranked(runs):
        best = best_runs(runs, variant)
        tried = sorted({run["rate"] for run in runs if run["variant"] == variant})
        reached = [
            next((point for point in run["curve"] if point[2] <= target), None) for run in best
        ]
        to_target = ["not reached"] * 2
        if None not in reached:
            points = list(zip(*reached, strict=True))
            to_target = [f"{statistics.mean(points[i]):.0f}" for i in (0, 1)]
        losses = [last_loss(run) for run in best]
        whole = statistics.mean(run["curve"][-1][1] for run in best)
        spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        cells = [
            variant,
            ", ".join(f"{rate:g}" for rate in tried),
            f"{best[0]['rate']:g}",
            str(len(best)),
            *to_target,
            f"{whole:.0f}",
            f"{statistics.mean(losses):.3f}{spread}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[], help="variants")
    parser.add_argument("--factors", type=float, nargs="*", default=[1.0, 0.5, 2.0])
    parser.add_argument("--finalists", type=int, default=5, help="variants that run more seeds")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    file: Any = execute(EXPERIMENT)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    done = args.output.read_text().splitlines() if args.output.exists() else []
    runs = [json.loads(line) for line in done]

    def run(variant: str, factor: float, seed: int) -> None:
        rate = float(f"{file.OPTIMIZERS[variant][0] * factor:.3g}")
        if any((r["variant"], r["rate"], r["seed"]) == (variant, rate, seed) for r in runs):
            return
        runs.append(race(variant, factor, seed))
        with args.output.open("a") as output:
            print(json.dumps(runs[-1]), file=output)
        print(variant, rate, seed, runs[-1]["curve"][-1], file=sys.stderr)
        jax.clear_caches()

    for factor in args.factors:
        for variant in args.only or file.OPTIMIZERS:
            run(variant, factor, 0)
    for variant in ranked(runs)[: args.finalists] if args.factors else []:
        for seed in range(1, args.seeds):
            run(variant, best_runs(runs, variant)[0]["rate"] / file.OPTIMIZERS[variant][0], seed)
    print(table(runs, file.TARGET))


if __name__ == "__main__":
    main()
