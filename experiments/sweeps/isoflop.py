"""IsoFLOP grid (Hoffmann et al. 2022, approach 2): at each budget, from small models trained long
to large ones trained briefly; `lm scaling` finds the best size of each budget.

Sizes are those of the stdlib experiment, which counts FLOPs as lm/flops.py does. The budgets are
those of two CPU cores: give others, as `isoflop.py:1e15,3e15,1e16`.

    lm sweep --config experiments/sweeps/isoflop.py --workdir runs/isoflop
"""

from lm.errors import UserError
from lm.sweeps.sets import named
from lm.sweeps.sweep import Sweep

BUDGETS = "1e12,3e12,1e13"  # training FLOPs
SIZES = ((1, 32, 2), (2, 64, 4), (3, 96, 4), (4, 128, 4), (4, 192, 6), (6, 256, 8))
VOCABULARY, LENGTH, BATCH = 1024, 128, 8
FEWEST_STEPS, MOST_STEPS = 30, 20_000


def flops_per_token(n_layers, d_model):
    """6 × (12 L d² + V d) + 6 L d × length, the attention products being causal."""
    matrices = 12 * n_layers * d_model**2 + VOCABULARY * d_model
    return 6 * (matrices + n_layers * d_model * LENGTH)


def get_sweep(budgets=BUDGETS):
    sets = []
    for budget in map(float, budgets.split(",")):
        for n_layers, d_model, n_heads in SIZES:
            steps = round(budget / flops_per_token(n_layers, d_model) / (LENGTH * BATCH))
            if FEWEST_STEPS <= steps <= MOST_STEPS:
                sets.append(
                    {
                        "model.n_layers": n_layers,
                        "model.d_model": d_model,
                        "model.n_heads": n_heads,
                        "train.steps": steps,
                        "schedule.warmup_steps": steps // 20,
                    }
                )
    if not sets:
        raise UserError(f"no size takes {FEWEST_STEPS} to {MOST_STEPS} steps at {budgets} FLOPs")
    common = {
        "data.tokenizer_vocab_size": VOCABULARY,
        "model.vocab_size": VOCABULARY,
        "data.sequence_length": LENGTH,
        "data.batch_size": BATCH,
        "eval.every_steps": 0,
        "log.tensorboard": False,
    }
    return Sweep("experiments/stdlib.py:tiny", {k: common | v for k, v in named(sets).items()})
