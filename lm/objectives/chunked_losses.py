"""Token losses computed in parts, for `--config.train.loss_chunk`.

Parts are chunks of columns or, if devices share the rows, blocks of the vocabulary: a chunk would
gather the whole output layer again and sum its whole gradient over the devices, a block gathers and
sums its own part of it.

Shape letters: N parts, B batch, T targets, D model, V vocabulary, W tokens of a block, C devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import NEG_INF
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import MODEL_STATE
from lm.models.vocabulary_blocks import vocabulary_block
from lm.objectives.losses import TokenLosses
from lm.parallel.mesh import constrain, count_shards

if TYPE_CHECKING:
    from lm.objectives.objective import BoundModel

Losses = TypeVar("Losses")
LANES = 128  # of a TPU; the width of a block is a multiple


def losses_in_parts(
    compute: Callable[..., TokenLosses],
    model: BoundModel,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    *,
    of: str = "logits",
) -> TokenLosses:
    """Return the losses of target tokens, in blocks of the vocabulary or chunks of columns.

    Args:
        compute: returns the losses from the model, hidden states and targets.
        model: bound model that computes the logits.
        x_BTD: hidden states at the targets.
        targets_BT: token ids, int32.
        label_smoothing: see `losses.cross_entropy`.
        z_loss: see `losses.cross_entropy`.
        of: name of the model's method that computes logits.
    """
    shares_rows = count_shards("rows") * count_shards("length") > 1
    c, shares_vocabulary = model.config, count_shards("vocab") > 1
    if not shares_rows or shares_vocabulary or not isinstance(c, TransformerConfig) or c.copy:
        return in_chunks(compute, model, x_BTD, targets_BT)
    V, n_columns = c.vocab_size, -(-targets_BT.shape[1] // count_shards("length"))
    size = -(-V * c.loss_chunk // n_columns)
    size = -(-size // LANES) * LANES
    if size >= V:
        return compute(model, x_BTD, targets_BT)
    return _in_blocks(model, x_BTD, targets_BT, label_smoothing, z_loss, of, size)


def _in_blocks(
    model: BoundModel,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    label_smoothing: float,
    z_loss: float,
    of: str,
    size: int,
) -> TokenLosses:
    """Return the losses of target tokens, with logits of a block of the vocabulary at a time.

    A block has as many logits as a chunk of `loss_chunk` columns. They are computed again for the
    gradient.

    Args:
        model: bound model that computes the logits.
        x_BTD: hidden states at the targets.
        targets_BT: token ids, int32.
        label_smoothing: see `losses.cross_entropy`.
        z_loss: see `losses.cross_entropy`.
        of: name of the model's method that computes logits.
        size: tokens of a block.
    """
    assert isinstance(model.config, TransformerConfig)
    V = model.config.vocab_size

    def step(model: BoundModel, carry: None, number: Any, x_BTD: Any, targets_BT: Any) -> tuple:
        first = jnp.minimum(number * size, V - size)
        with vocabulary_block(first, size):
            logits_BTW = getattr(model, of)(x_BTD).astype(jnp.float32)
        ids_W = first + jnp.arange(size)
        is_new_W = ids_W >= number * size  # the last block overlaps the one before
        is_target_BTW = (targets_BT[..., None] == ids_W) & is_new_W
        seen_BTW = jnp.where(is_new_W, logits_BTW, NEG_INF)
        return None, (
            jax.nn.logsumexp(seen_BTW, axis=-1),
            jax.lax.stop_gradient(seen_BTW).max(-1),
            jnp.where(is_target_BTW, logits_BTW, 0).sum(-1),
            jnp.where(is_new_W, logits_BTW, 0).sum(-1) if label_smoothing else None,
        )

    scan = nn.scan(
        nn.remat(step, prevent_cse=False),
        variable_broadcast=("params", MODEL_STATE),
        split_rngs={"params": False, "dropout": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
    )
    # The gradient of the hidden states, a sum over blocks, is accumulated in float32.
    x_BTD = constrain(x_BTD, "rows", "length", "embed").astype(jnp.float32)
    given = jnp.arange(-(-V // size)), x_BTD, targets_BT
    _, (log_z_NBT, largest_NBT, picked_NBT, sum_NBT) = scan(model, None, *given)
    log_z_BT, picked_BT = jax.nn.logsumexp(log_z_NBT, axis=0), picked_NBT.sum(0)
    nll_BT = loss_BT = log_z_BT - picked_BT
    if label_smoothing:
        to_uniform_BT = log_z_BT - sum_NBT.sum(0) / V
        loss_BT = (1 - label_smoothing) * nll_BT + label_smoothing * to_uniform_BT
    if z_loss:
        loss_BT += z_loss * log_z_BT**2
    correct_BT = (picked_BT == largest_NBT.max(0)).astype(jnp.float32)
    return TokenLosses(loss_BT, nll_BT, correct_BT)


def in_chunks(compute: Callable[..., Losses], model: BoundModel, *columns: Any) -> Losses:
    """Compute the loss of every target in chunks of columns.

    The logits [B, T, V] are never materialized as a whole. They are recomputed for the gradient,
    which saves memory and on CPU is faster than reading them back. Chunks split columns because
    rows are sharded over devices; if columns are sharded too (over C devices), a chunk takes
    `loss_chunk` columns of every device.

    Args:
        compute: returns per-target losses, a tree of [B, T], from the model and columns.
        model: bound model.
        *columns: trees of arrays [B, T, …]; the first has the hidden states at the targets.
    """
    B, T = jax.tree.leaves(columns)[0].shape[:2]
    shards = count_shards("residual_length"), count_shards("length"), 1
    C = next(n for n in shards if T % n == 0)
    # Tensor-parallel devices share the columns of a chunk; each computes part of its logits.
    longest = -(-model.config.loss_chunk // max(1, C // shards[1]))
    n = -(-(T // C) // longest) if longest else 1
    if n == 1:
        return compute(model, *columns)
    width = -(-(T // C) // n)
    n_added = n * width - T // C  # columns of every device, so that chunks are equal

    def step(model: BoundModel, carry: None, chunk: tuple[Any, ...]) -> tuple:
        return None, compute(model, *chunk)

    scan = nn.scan(
        nn.remat(step, prevent_cse=False),
        variable_broadcast=("params", MODEL_STATE),
        split_rngs={"params": False, "dropout": True},
    )

    def split(x_BT: jax.Array) -> jax.Array:
        x_BCT = x_BT.reshape(B, C, T // C, *x_BT.shape[2:])
        x_BCT = jnp.pad(x_BCT, ((0, 0), (0, 0), (0, n_added), *((0, 0),) * (x_BT.ndim - 2)))
        x_BCNT = x_BCT.reshape(B, C, n, width, *x_BT.shape[2:])
        return jnp.moveaxis(x_BCNT, 2, 0).reshape(n, B, C * width, *x_BT.shape[2:])

    def join(x_NBT: jax.Array) -> jax.Array:
        x_BCT = jnp.moveaxis(x_NBT.reshape(n, B, C, width), 0, 2).reshape(B, C, n * width)
        return x_BCT[:, :, : T // C].reshape(B, T)

    first, *others = columns
    first = jax.tree.map(lambda x: constrain(x, "rows", "residual_length", "embed"), first)
    _, losses = scan(model, None, jax.tree.map(split, (first, *others)))
    return jax.tree.map(join, losses)
