"""IsoFLOP grid (Hoffmann et al. 2022, approach 2): for each compute budget, models of many sizes.

`lm scaling` finds the best size of each budget. The models have two layers and read the standard
library as bytes, so that embeddings are a small part of the parameters. The number of steps follows
from the budget by C = 6 N D, where N counts all parameters, as in `lm scaling`. Warmup and decay
scale with the number of steps, and the learning rate falls with the width. The default budgets suit
one CPU core; give others as `isoflop.py:1e15,3e15,1e16`.

    lm sweep --config experiments/sweeps/isoflop.py --workdir runs/isoflop
    lm scaling --workdir runs/isoflop

The results are in experiments/results/isoflop/.
"""

from lm.errors import UserError
from lm.sweeps.sweep import Sweep

BUDGETS = "3e10,1e11,3e11"  # training FLOPs
WIDTHS = 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512
LAYERS, HEADS, VOCABULARY, LENGTH, BATCH, DISPATCH = 2, 2, 257, 128, 8, 10
TOKENS_PER_PARAMETER = 7, 500  # sizes outside this range are far from the best


def parameters(d_model):
    """Return the parameter count: embeddings, norms and 12 d² per layer, without biases."""
    return VOCABULARY * d_model + LAYERS * (12 * d_model**2 + 2 * d_model) + d_model


def learning_rate(d_model):
    """Return a rate within a factor of two of the best in short runs at widths 32 and 96."""
    return round(min(1.6e-2, 5e-3 * (64 / d_model) ** 1.5), 5)


def get_sweep(budgets=BUDGETS):
    fewest, most = TOKENS_PER_PARAMETER
    runs = {}
    for budget in map(float, budgets.split(",")):
        for d_model in WIDTHS:
            tokens = budget / (6 * parameters(d_model))
            if fewest <= tokens / parameters(d_model) <= most:
                steps = DISPATCH * round(tokens / (BATCH * LENGTH * DISPATCH))
                runs[f"flop={budget:g},d_model={d_model}"] = {
                    "model.d_model": d_model,
                    "train.steps": steps,
                    "schedule.warmup_steps": steps // 20,
                    "optimizer.learning_rate": learning_rate(d_model),
                }
    if not runs:
        raise UserError(f"no size has {fewest} to {most} tokens per parameter at {budgets} FLOPs")
    common = {
        "data.tokenizer": "byte",
        "data.sequence_length": LENGTH,
        "data.batch_size": BATCH,
        "model.n_layers": LAYERS,
        "model.n_heads": HEADS,
        "train.steps_per_dispatch": DISPATCH,
        "optimizer.name": "adamw",
        "eval.every_steps": 0,
        "eval.batch_size": 32,
        "eval.final_batches": 32,
        "checkpoint.every_seconds": 60,
        "log.tensorboard": False,
    }
    return Sweep("experiments/stdlib.py:tiny", {k: common | v for k, v in runs.items()})
