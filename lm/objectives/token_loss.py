"""The loss of predicted tokens: causal, prefix, masked and sequence-to-sequence training share it.

Shape letters: B batch, T targets, D model, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.cross_entropy import TokenLosses, cross_entropy
from lm.objectives.objective import Sums


def token_loss(
    model: Any,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Sums:
    """Weighted sums over the targets of the loss and, as metrics, of "nll" and "accuracy".

    `x_BTD` is what `model.logits` makes scores of. "nll" is plain nats whatever the loss adds, so
    its mean is the logarithm of the perplexity. The options are those of `cross_entropy`.
    """
    losses = _losses(model, x_BTD, targets_BT, label_smoothing, z_loss)
    return Sums(
        loss=(losses.loss_BL * weights_BT).sum(),
        weight=weights_BT.sum(),
        metrics={
            "nll": (losses.nats_BL * weights_BT).sum(),
            "accuracy": (losses.right_BL * weights_BT).sum(),
        },
    )


def _losses(
    model: Any, x_BTD: jax.Array, targets_BT: jax.Array, label_smoothing: float, z_loss: float
) -> TokenLosses:
    """The losses of some columns at a time, so that the logits [B, T, V] never exist whole.

    They are computed again for the gradient: on a CPU that is faster than reading them back, and
    anywhere it saves the memory. Columns, because rows lie on different devices.
    """

    def of_part(model: Any, x_BTD: jax.Array, targets_BT: jax.Array) -> TokenLosses:
        return cross_entropy(model.logits(x_BTD), targets_BT, label_smoothing, z_loss)

    B, T = targets_BT.shape
    n = parts(T, model.config.loss_chunk)
    if n == 1:
        return of_part(model, x_BTD, targets_BT)

    def step(model: Any, nothing: None, part: tuple[jax.Array, jax.Array]) -> tuple:
        return None, of_part(model, *part)

    columns = nn.scan(
        nn.remat(step, prevent_cse=False),
        variable_broadcast="params",
        split_rngs={"params": False, "dropout": True},
    )
    x_NBTD = x_BTD.reshape(B, n, T // n, -1).swapaxes(0, 1)
    _, losses = columns(model, None, (x_NBTD, targets_BT.reshape(B, n, T // n).swapaxes(0, 1)))
    return jax.tree.map(lambda part_NBT: jnp.swapaxes(part_NBT, 0, 1).reshape(B, T), losses)


def parts(length: int, chunk: int) -> int:
    """The fewest equal parts of `length` that are no longer than `chunk`; 0: one part."""
    fewest = -(-length // chunk) if chunk else 1
    return next(n for n in range(fewest, length + 1) if length % n == 0)
