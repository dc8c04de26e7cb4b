"""Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464) as in Qwen3-Next.

Mamba-2's projections, convolution and cache, with the recurrence of `lm/kernels/delta_rule.py`:
a token replaces what the state holds for its key, at a rate of its own.

Shape letters: B batch, L query length, W width of the input, H heads of values, P their width,
G heads of keys and queries, N their width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm.kernels.delta_rule import delta_rule
from lm.models.mamba import OF_HEADS, RecurrenceInputs, StateSpaceMixer
from lm.models.variables import Kind, Role, param
from lm.parallel.mesh import constrain

_EPS = 1e-6  # of the length of keys and queries


class GatedDelta(StateSpaceMixer):
    """Gated DeltaNet: keys and queries have unit length, and each head's output is normalized."""

    INPUTS = ("v", "k", "q")

    def setup(self) -> None:
        super().setup()
        o, norm = self.config.mixer_options, Role(Kind.NORM, self.config.stream)
        self.rate = self.linear((o.ssm_heads,), "heads")
        ones = jax.nn.initializers.ones
        self.scale = param(self, "scale", ones, (o.ssm_head_dim,), ("norm",), norm)

    def recur(self, inputs: RecurrenceInputs) -> tuple[jax.Array, jax.Array]:
        """Run the gated delta rule; its decay is that of Mamba-2."""
        v_BLHP, k_BLGN, q_BLGN = inputs.convolved
        o, log_decay_BLH = self.config.mixer_options, -inputs.dt_BLH * jnp.exp(self.decay)
        rate_BLH = jax.nn.sigmoid(self.rate(inputs.x_BLW).astype(jnp.float32))
        return delta_rule(
            v_BLHP,
            log_decay_BLH,
            rate_BLH * inputs.is_token_BL1,
            _of_unit_length(k_BLGN),
            _of_unit_length(q_BLGN) * o.ssm_state**-0.5,
            inputs.ids_BL,
            inputs.state_BHPN,
            o.ssm_chunk,
        )

    def gated_norm(self, y_BLHP: jax.Array, gate_BLHP: jax.Array) -> jax.Array:
        """Divide each head by its root mean square, and multiply by the gate."""
        y_BLHP = constrain(y_BLHP, "batch", "length", *OF_HEADS)
        y_BLHP *= jax.lax.rsqrt(jnp.square(y_BLHP).mean(-1, keepdims=True) + self.config.norm_eps)
        return y_BLHP * self.scale * jax.nn.silu(gate_BLHP)


def _of_unit_length(x_BLGN: jax.Array) -> jax.Array:
    return x_BLGN * jax.lax.rsqrt(jnp.square(x_BLGN).sum(-1, keepdims=True) + _EPS)
