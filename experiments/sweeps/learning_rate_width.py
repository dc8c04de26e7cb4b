"""Learning rate × width: where the best learning rate goes as a model gets wider.

The stdlib experiment's two layers at four widths, each at seven learning rates of AdamW, a factor
of two apart. In the standard parametrisation the best rate falls with the width.

    lm sweep --config experiments/sweeps/learning_rate_width.py --workdir runs/rate_width
"""

from lm.sweeps.sets import grid, named
from lm.sweeps.sweep import Sweep

COMMON = {"optimizer.name": "adamw", "train.steps": 300, "log.tensorboard": False}


def get_sweep():
    sets = grid(
        {
            "model.d_model": [64, 128, 256, 512],
            "optimizer.learning_rate": [2.0**-power for power in range(12, 5, -1)],
        }
    )
    runs = {name: COMMON | overrides for name, overrides in named(sets).items()}
    return Sweep("experiments/stdlib.py:tiny", runs)
