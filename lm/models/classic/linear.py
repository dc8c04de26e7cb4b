"""Linear maps of the models before the Transformer."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from lm.models.layers import Linear
from lm.models.transformer_config import InitConfig
from lm.models.variables import Initializer, Role


def init_linear(
    config: InitConfig,
    n_in: int,
    out_shape: tuple[int, ...],
    names: tuple[str, ...],
    role: Role,
    use_bias: bool = True,
    bias_init: Initializer = nn.initializers.zeros,
    name: str | None = None,
) -> Linear:
    """Build a linear map with float32 output, initialized by the model's configuration.

    Args:
        config: initialization and compute dtype.
        n_in: width of the input.
        out_shape: shape of the output.
        names: logical axes of the kernel [n_in, *out_shape].
        role: role of the kernel.
        use_bias: add a bias.
        bias_init: initializer of the bias, unless all initialization is uniform.
        name: module name.
    """
    c = config
    return Linear(
        (n_in,),
        out_shape,
        names,
        role,
        use_bias,
        c.kernel_init(c.stddev(n_in, out_shape[-1])),
        c.dtype,
        out_dtype=jnp.float32,
        bias_init=c.bias_init(bias_init),
        name=name,
    )
