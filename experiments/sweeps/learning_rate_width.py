"""Learning rate × width: how the best learning rate depends on the width, with and without muP.

Two layers on bytes of the standard library, at four widths and seven learning rates of AdamW that
are a factor of two apart, for 200 short steps. In the standard parametrization the best rate falls
with the width. With muP (Yang et al. 2022) it stays at the best rate of the base width, 64, where
both parametrizations are the same model.

    lm sweep --config experiments/sweeps/learning_rate_width.py --workdir runs/rate_width/standard
    lm sweep --config experiments/sweeps/learning_rate_width.py:mup --workdir runs/rate_width/mup
    python scripts/learning_rate_width.py --workdir runs/rate_width --output rate_width.png
"""

from lm.config import choose
from lm.sweeps.sets import grid, named
from lm.sweeps.sweep import Sweep

VARIANTS = {
    "standard": {},
    "mup": {"model.mup_base_width": 64, "model.mup_base_head_dim": 16},
}
COMMON = {
    "data.tokenizer": "byte",
    "data.sequence_length": 64,
    "data.batch_size": 8,
    "optimizer.name": "adamw",
    "train.steps": 200,
    "train.steps_per_dispatch": 10,
    "schedule.warmup_steps": 20,
    "eval.every_steps": 0,
    "eval.batch_size": 32,
    "eval.final_batches": 32,
    "log.tensorboard": False,
}


def get_sweep(variant="standard"):
    sets = grid(
        {
            "model.d_model": [32, 64, 128, 256],
            "optimizer.learning_rate": [2.0**-power for power in range(11, 4, -1)],
        }
    )
    common = COMMON | choose(VARIANTS, variant)
    runs = {name: common | overrides for name, overrides in named(sets).items()}
    return Sweep("experiments/stdlib.py:tiny", runs)
