"""The loss of predicted tokens: causal, prefix, masked and sequence-to-sequence training share it.

Shape letters: B batch, T targets, D model, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.cross_entropy import TokenLosses, cross_entropy
from lm.models.variables import MODEL_STATE
from lm.objectives.objective import LossSums
from lm.parallel.sharding import constrain, count_shards


def token_loss(
    model: Any,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> LossSums:
    """Weighted sums over the targets of the loss and, as metrics, of "nll" and "accuracy".

    `x_BTD` is what `model.logits` makes scores of. "nll" is plain nats whatever the loss adds, so
    its mean is the logarithm of the perplexity. The options are those of `cross_entropy`.
    """
    losses = _losses(model, x_BTD, targets_BT, label_smoothing, z_loss)
    return LossSums(
        loss=(losses.loss_BL * weights_BT).sum(),
        weight=weights_BT.sum(),
        metrics={
            "nll": (losses.nll_BL * weights_BT).sum(),
            "accuracy": (losses.correct_BL * weights_BT).sum(),
        },
    )


def _losses(
    model: Any, x_BTD: jax.Array, targets_BT: jax.Array, label_smoothing: float, z_loss: float
) -> TokenLosses:
    """The losses of some columns at a time, so that the logits [B, T, V] never exist whole.

    They are computed again for the gradient: on a CPU that is faster than reading them back, and
    anywhere it saves the memory. Columns, because rows lie on different devices; where columns do
    too (C of them), some of every device's at a time.
    """

    def of_part(model: Any, x_BTD: jax.Array, targets_BT: jax.Array) -> TokenLosses:
        return cross_entropy(model.logits(x_BTD), targets_BT, label_smoothing, z_loss)

    B, T = targets_BT.shape
    C = count_shards("length") if T % count_shards("length") == 0 else 1
    n = parts(T // C, -(-model.config.loss_chunk // C))
    if n == 1:
        return of_part(model, x_BTD, targets_BT)

    def step(model: Any, nothing: None, part: tuple[jax.Array, jax.Array]) -> tuple:
        return None, of_part(model, *part)

    columns = nn.scan(
        nn.remat(step, prevent_cse=False),
        variable_broadcast=("params", MODEL_STATE),
        split_rngs={"params": False, "dropout": True},
    )

    def chunks(x_BT: jax.Array) -> jax.Array:
        x_BCNT = x_BT.reshape(B, C, n, T // (C * n), *x_BT.shape[2:])
        return jnp.moveaxis(x_BCNT, 2, 0).reshape(n, B, T // n, *x_BT.shape[2:])

    def whole(x_NBT: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_NBT.reshape(n, B, C, -1), 0, 2).reshape(B, T)

    x_BTD = constrain(x_BTD, "rows", "length", "embed")
    _, losses = columns(model, None, (chunks(x_BTD), chunks(targets_BT)))
    return jax.tree.map(whole, losses)


def parts(length: int, chunk: int) -> int:
    """The fewest equal parts of `length` that are no longer than `chunk`; 0: one part."""
    fewest = -(-length // chunk) if chunk else 1
    return next(n for n in range(fewest, length + 1) if length % n == 0)
