"""Stack whose first layer has a convolution beside it (DeBERTa 2, He et al. 2021, §5.1's nGiE).

Shape letters: B batch, L length, D model, K taps.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.elementwise import ACTIVATIONS
from lm.models.layers import Linear, make_norm
from lm.models.transformer import BlockOutput, LayerInputs, ScanCarry, Stack, StackInputs
from lm.models.transformer_config import Segment
from lm.models.variables import Kind, Role


class ConvolvedStack(Stack):
    """Stack that adds a convolution of its input to the output of the first layer, normalized."""

    def _run_segment(
        self, segment: Segment, carry: ScanCarry, inputs: StackInputs, layers: LayerInputs
    ) -> BlockOutput:
        c, x_BLD = self.config, carry[0]
        (y_BLD, cache), source = super()._run_segment(segment, carry, inputs, layers)
        if segment.first == 0:
            init = c.kernel_init(c.std(c.first_conv * c.d_model, c.d_model))
            names, role = ("taps", "embed", "residual"), Role(Kind.MATRIX, c.stream)
            shapes = (c.first_conv, c.d_model), (c.d_model,)
            convolve = Linear(*shapes, names, role, True, init, c.dtype, name="convolution")
            z_BLD = convolve(neighbors(x_BLD, inputs.mask.segments_BL, c.first_conv))
            z_BLD = nn.Dropout(c.dropout, deterministic=self.deterministic)(z_BLD)
            z_BLD = ({"tanh": jnp.tanh} | ACTIVATIONS)[c.conv_activation](z_BLD)
            y_BLD = make_norm(c, "convolution_norm")(y_BLD + z_BLD)
        return (y_BLD, cache), source


def neighbors(x_BLD: jax.Array, segments_BL: jax.Array | None, taps: int) -> jax.Array:
    """Return the `taps` tokens around each, [B, L, K, D]; zeros for those of other segments."""
    if segments_BL is None:
        segments_BL = jnp.ones(x_BLD.shape[:2], jnp.int32)
    segments_BL = jnp.broadcast_to(segments_BL, x_BLD.shape[:2])
    L, sides = x_BLD.shape[1], (taps // 2, taps // 2)
    padded_x = jnp.pad(x_BLD, ((0, 0), sides, (0, 0)))
    padded_segments = jnp.pad(segments_BL, ((0, 0), sides), constant_values=-1)
    near = [
        jnp.where(
            (padded_segments[:, i : i + L] == segments_BL)[..., None], padded_x[:, i : i + L], 0
        )
        for i in range(taps)
    ]
    return jnp.stack(near, axis=2)
