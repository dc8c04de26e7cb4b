"""What every model's configuration says of numbers: how they are drawn, and their type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """The meaning of each field is in `lm/config/`."""

    init: str = "normal"
    init_std: float = 0.02
    init_scale: float = 1.0
    init_truncated: bool = False
    dtype: jnp.dtype = jnp.float32

    def stddev(self, n_in: float, n_out: float) -> float:
        """That of a fresh kernel; of "uniform" the bound."""
        by_kind = {
            "normal": self.init_std,
            "uniform": self.init_std,
            "fan_in": (self.init_scale / n_in) ** 0.5,
            "xavier": (2 / (n_in + n_out)) ** 0.5,
        }
        return by_kind[self.init]

    def kernel_init(self, stddev: float) -> Initializer:
        """A kernel or table; truncated, nothing is beyond two deviations, and what is left has 0.88
        of the deviation (as in the code of Devlin et al. 2018 and Fedus et al. 2021, §2.4)."""
        if self.init == "uniform":
            return symmetric(stddev)
        draw = nn.initializers.truncated_normal if self.init_truncated else nn.initializers.normal
        return draw(stddev)

    @property
    def table_init(self) -> Initializer:
        """An embedding."""
        return self.kernel_init(self.init_std)

    def bias_init(self, start: Initializer = nn.initializers.zeros) -> Initializer:
        """A bias: `start`, unless everything is uniform."""
        return symmetric(self.init_std) if self.init == "uniform" else start


def symmetric(bound: float) -> Initializer:
    """Uniform in ± bound."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
