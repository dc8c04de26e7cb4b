"""IsoFLOP grid (Hoffmann et al. 2022, approach 2): at each budget, from small models trained long
to large ones trained briefly; `lm scaling` finds the best size of each budget.

Bytes of the standard library, so that a small model is not mostly its token table, two layers of
AdamW. A run's steps follow from its budget by C = 6 N D, N being all parameters, as `lm scaling`
counts them; each has a warm-up and a decay of its own, that end with it, and the rate falls with
the width. The budgets are those of one CPU core: give others, as `isoflop.py:1e15,3e15,1e16`.

    lm sweep --config experiments/sweeps/isoflop.py --workdir runs/isoflop
    lm scaling --workdir runs/isoflop

experiments/results/isoflop/ has what came of it.
"""

from lm.errors import UserError
from lm.sweeps.sweep import Sweep

BUDGETS = "3e10,1e11,3e11"  # training FLOPs
WIDTHS = 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512
LAYERS, HEADS, VOCABULARY, LENGTH, BATCH, DISPATCH = 2, 2, 257, 128, 8, 10
TOKENS_PER_PARAMETER = 7, 500  # outside of these a size is far from the best


def parameters(d_model):
    """Token table, norms, and 12 d² a layer, without biases."""
    return VOCABULARY * d_model + LAYERS * (12 * d_model**2 + 2 * d_model) + d_model


def learning_rate(d_model):
    """Near the best of short runs at widths 32 and 96, a factor of two apart."""
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
        raise UserError(f"no size has {fewest} to {most} tokens a parameter at {budgets} FLOPs")
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
