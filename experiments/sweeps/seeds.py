"""The same experiment with several seeds, to see how much results vary by chance.

lm sweep --config experiments/sweeps/seeds.py --workdir runs/seeds
lm sweep --config experiments/sweeps/seeds.py:10 --workdir runs/seeds
"""

from lm.sweeps.sets import grid, named
from lm.sweeps.sweep import Sweep


def get_sweep(n="5"):
    return Sweep("experiments/stdlib.py:tiny", named(grid({"seed": range(int(n))})))
