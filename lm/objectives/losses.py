"""Shared losses: cross-entropy per target, and summed over a batch.

Shape letters: N layers, B batch, L length, T targets, D model, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.objectives.objective import BoundModel, LossSums


class TokenLosses(NamedTuple):
    """Losses of each target, float32 [B, L]; only `loss_BL` has a gradient.

    Attributes:
        loss_BL: training loss, with label smoothing and z-loss.
        nll_BL: negative log-likelihood in nats.
        correct_BL: 1 if the target has the largest logit, else 0.
    """

    loss_BL: jax.Array
    nll_BL: jax.Array
    correct_BL: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def cross_entropy(
    logits_BLV: jax.Array, targets_BL: jax.Array, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> TokenLosses:
    """Compute softmax cross-entropy in float32, with a backward pass that reads the logits once.

    Args:
        logits_BLV: logits of any float dtype.
        targets_BL: integer targets.
        label_smoothing: probability mass ε spread evenly over the vocabulary (Szegedy 2015, §7;
            Vaswani 2017, §5.4).
        z_loss: weight of log²(Σ exp(logits)), added to the loss (1e-4 in T5's code).

    Returns:
        Losses of each target.
    """
    return _cross_entropy_forward(logits_BLV, targets_BL, label_smoothing, z_loss)[0]


@jax.named_scope("cross_entropy")
def _cross_entropy_forward(
    logits_BLV: jax.Array, targets_BL: jax.Array, label_smoothing: float, z_loss: float
) -> tuple[TokenLosses, tuple]:
    logits_BLV = logits_BLV.astype(jnp.float32)
    largest_BL = logits_BLV.max(-1)
    log_z_BL = largest_BL + jnp.log(jnp.exp(logits_BLV - largest_BL[..., None]).sum(-1))
    picked_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    nll_BL = loss_BL = log_z_BL - picked_BL
    if label_smoothing:
        to_uniform_BL = log_z_BL - logits_BLV.mean(-1)
        loss_BL = (1 - label_smoothing) * nll_BL + label_smoothing * to_uniform_BL
    if z_loss:
        loss_BL += z_loss * log_z_BL**2
    correct_BL = (picked_BL == largest_BL).astype(jnp.float32)
    return TokenLosses(loss_BL, nll_BL, correct_BL), (logits_BLV, targets_BL, log_z_BL)


@jax.named_scope("cross_entropy")
def _cross_entropy_backward(
    label_smoothing: float, z_loss: float, residuals: tuple, g: TokenLosses
) -> tuple[jax.Array, None]:
    logits_BLV, targets_BL, log_z_BL = residuals
    # Compare with all columns, since the gradient of a gather would be a scatter.
    is_target_BLV = targets_BL[..., None] == jnp.arange(logits_BLV.shape[-1])
    target_probs_BLV = jnp.where(is_target_BLV, 1 - label_smoothing, 0) + (
        label_smoothing / logits_BLV.shape[-1]
    )
    slope_BL = g.loss_BL * (1 + 2 * z_loss * log_z_BL)
    probs_BLV = jnp.exp(logits_BLV - log_z_BL[..., None])
    return slope_BL[..., None] * probs_BLV - g.loss_BL[..., None] * target_probs_BLV, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def token_losses(
    model: BoundModel, x_BTD: jax.Array, targets_BT: jax.Array, *settings: float, of: str = "logits"
) -> TokenLosses:
    """Return the losses of target tokens, in chunks if `model.config.loss_chunk` is set.

    Args:
        model: bound model that computes the logits.
        x_BTD: hidden states at the targets.
        targets_BT: token ids, int32.
        *settings: label smoothing and z-loss weight, see `cross_entropy`.
        of: name of the model's method that computes logits.
    """

    def compute(model: BoundModel, x_BTD: jax.Array, targets_BT: jax.Array) -> TokenLosses:
        return cross_entropy(getattr(model, of)(x_BTD), targets_BT, *settings)

    if not model.config.loss_chunk:
        return compute(model, x_BTD, targets_BT)
    from lm.objectives.chunked_losses import losses_in_parts

    return losses_in_parts(compute, model, x_BTD, targets_BT, *settings, of=of)


def token_loss(
    model: BoundModel,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    of: str = "logits",
) -> LossSums:
    """Return the cross-entropy of target tokens, with metrics "nll" and "accuracy".

    Args:
        model: bound model that computes the logits.
        x_BTD: hidden states at the targets.
        targets_BT: token ids, int32.
        weights_BT: weight of each target, float32; 0: not a target.
        label_smoothing: probability mass spread over the vocabulary.
        z_loss: weight of the squared log-partition function.
        of: name of the model's method that computes logits.
    """
    losses = token_losses(model, x_BTD, targets_BT, label_smoothing, z_loss, of=of)
    return LossSums(
        loss=(losses.loss_BL * weights_BT).sum(),
        weight=weights_BT.sum(),
        metrics={
            "nll": (losses.nll_BL * weights_BT).sum(),
            "accuracy": (losses.correct_BL * weights_BT).sum(),
        },
    )
