"""Projection of the residual stream widened by blocks with `residual="concat"`.

Shape letters: B batch, L query length, W width of the input.
"""

from __future__ import annotations

import jax

from lm.models.layers import Linear
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Kind, Part, Role


def project(
    config: TransformerConfig, x_BLW: jax.Array, n_out: int, name: str, part: Part = "layers"
) -> jax.Array:
    """Apply a linear map without bias to the residual stream of `residual="concat"`.

    Args:
        config: configuration of the stack.
        x_BLW: input of any width.
        n_out: width of the output.
        name: module name.
        part: part of the model that the kernel belongs to.
    """
    c, width = config, x_BLW.shape[-1]
    init, axes = c.kernel_init(c.std(width, n_out)), ("embed", "residual")
    role = Role(Kind.MATRIX, c.stream, part)
    return Linear((width,), (n_out,), axes, role, False, init, c.dtype, name=name)(x_BLW)
