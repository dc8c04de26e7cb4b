"""Linear maps and tables with the initialisations of recurrent models and their relatives.

Shape letters: B batch, L length, D inputs.
"""

from __future__ import annotations

from math import prod
from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.bias import add_bias
from lm.kernels.matmul import matmul
from lm.models.layers import Embedding, Initializer, named


class Numeric(Protocol):
    """What these layers read from a model's configuration."""

    @property
    def init(self) -> str: ...
    @property
    def init_std(self) -> float: ...
    @property
    def dtype(self) -> jnp.dtype: ...


def symmetric(bound: float) -> Initializer:
    """Uniform in ± bound."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


class Affine(nn.Module):
    """x W + b, float32; `names` are the logical axes of W, [n_in, *shape].

    With config.init "uniform" W and b start in ± init_std, otherwise W is normal and b is
    `bias_init`.
    """

    n_in: int
    shape: tuple[int, ...]
    names: tuple[str, ...]
    config: Numeric
    use_bias: bool = True
    bias_init: Initializer = nn.initializers.zeros

    def setup(self) -> None:
        c = self.config
        kernel, bias = symmetric(c.init_std), symmetric(c.init_std)
        if c.init != "uniform":
            std = {
                "normal": c.init_std,
                "fan_in": self.n_in**-0.5,
                "xavier": (2 / (self.n_in + self.shape[-1])) ** 0.5,
            }[c.init]
            kernel, bias = nn.initializers.normal(std), self.bias_init
        shape = (self.n_in, *self.shape)
        self.kernel = self.param("kernel", named(kernel, self.names), shape, jnp.float32)
        if self.use_bias:
            self.bias = self.param("bias", named(bias, self.names[1:]), self.shape, jnp.float32)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """[..., D] to [..., *shape]."""
        kernel = self.kernel.reshape(self.n_in, prod(self.shape))
        y = matmul(x_BLD.reshape(-1, self.n_in), kernel, self.config.dtype)
        if self.use_bias:
            y = add_bias(y, self.bias.reshape(-1))
        return y.reshape(*x_BLD.shape[:-1], *self.shape)


class Table(Embedding):
    """An embedding that starts, with `uniform`, in ± std."""

    uniform: bool = False

    def setup(self) -> None:
        draw = symmetric if self.uniform else nn.initializers.normal
        init = named(draw(self.std), (self.row_name, "embed"))
        self.embedding = self.param("embedding", init, (self.rows, self.width), jnp.float32)


class Bias(nn.Module):
    """The bias of an output layer whose matrix is a table."""

    size: int
    config: Numeric

    @nn.compact
    def __call__(self, x_BLV: jax.Array) -> jax.Array:
        c = self.config
        init = symmetric(c.init_std) if c.init == "uniform" else nn.initializers.zeros
        bias_V = self.param("bias", named(init, ("vocab",)), (self.size,), jnp.float32)
        return add_bias(x_BLV, bias_V)
