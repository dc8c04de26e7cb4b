"""Cross-entropy of logits against integer targets, with a backward pass of one sweep.

Shape letters: B batch, L length, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenLosses(NamedTuple):
    """Of each target [B, L], float32: the loss that is learnt, plain nats, 1 where the target has
    the largest logit. Only the loss has a gradient."""

    loss_BL: jax.Array
    nats_BL: jax.Array
    right_BL: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def cross_entropy(
    logits_BLV: jax.Array,
    targets_BL: jax.Array,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> TokenLosses:
    """-log softmax(logits)[target] in nats, computed in float32.

    label_smoothing ε: 1 - ε on the target and ε spread evenly over the vocabulary (Szegedy 2015,
    §7; Vaswani 2017, §5.4). z_loss: this times log²(Σ exp(logits)) is added (T5's code, 1e-4).
    """
    return _forward(logits_BLV, targets_BL, label_smoothing, z_loss)[0]


def _forward(
    logits_BLV: jax.Array, targets_BL: jax.Array, label_smoothing: float, z_loss: float
) -> tuple[TokenLosses, tuple]:
    logits_BLV = logits_BLV.astype(jnp.float32)
    largest_BL = logits_BLV.max(-1)
    log_z_BL = largest_BL + jnp.log(jnp.exp(logits_BLV - largest_BL[..., None]).sum(-1))
    picked_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    nats_BL = loss_BL = log_z_BL - picked_BL
    if label_smoothing:
        to_uniform_BL = log_z_BL - logits_BLV.mean(-1)
        loss_BL = (1 - label_smoothing) * nats_BL + label_smoothing * to_uniform_BL
    if z_loss:
        loss_BL += z_loss * log_z_BL**2
    right_BL = (picked_BL == largest_BL).astype(jnp.float32)
    return TokenLosses(loss_BL, nats_BL, right_BL), (logits_BLV, targets_BL, log_z_BL)


def _backward(
    label_smoothing: float, z_loss: float, saved: tuple, g: TokenLosses
) -> tuple[jax.Array, None]:
    logits_BLV, targets_BL, log_z_BL = saved
    # A comparison with every column, where the gradient of the look-up would be a scatter.
    is_target_BLV = targets_BL[..., None] == jnp.arange(logits_BLV.shape[-1])
    wanted_BLV = jnp.where(is_target_BLV, 1 - label_smoothing, 0) + (
        label_smoothing / logits_BLV.shape[-1]
    )
    slope_BL = g.loss_BL * (1 + 2 * z_loss * log_z_BL)
    given_BLV = jnp.exp(logits_BLV - log_z_BL[..., None])
    return slope_BL[..., None] * given_BLV - g.loss_BL[..., None] * wanted_BLV, None


cross_entropy.defvjp(_forward, _backward)
