"""Every optimizer on the same model and data, at five learning rates around its usual one.

Successive halving on the validation loss: two thirds of the runs stop at step 100, and only the
best run to the end.

    lm sweep --config experiments/sweeps/optimizers.py --workdir runs/optimizers
"""

from lm.sweeps.sets import grid, named, product
from lm.sweeps.sweep import Halving, Sweep

CENTRES = {
    **{"adamw": 3e-3, "adafactor": 3e-2, "lion": 5e-4, "muon": 2e-2, "sgd": 0.3},
    **{"ademamix": 3e-3, "schedule_free": 1e-2, "soap": 3e-3},
}
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)


def get_sweep():
    sets = []
    for name, centre in CENTRES.items():
        rates = [float(f"{centre * factor:.3g}") for factor in FACTORS]
        own = {"optimizer.name": name}
        if name == "schedule_free":
            own["schedule.name"] = "constant"
        sets += product([own], grid({"optimizer.learning_rate": rates}))
    common = {"train.steps": 600, "eval.every_steps": 100, "log.tensorboard": False}
    runs = {name: common | overrides for name, overrides in named(sets).items()}
    return Sweep("experiments/stdlib.py:tiny", runs, Halving(first=100, factor=3))
