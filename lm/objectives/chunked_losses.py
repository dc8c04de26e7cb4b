"""Token losses computed in chunks of columns, for `--config.train.loss_chunk`.

Shape letters: N chunks, B batch, T targets, D model, V vocabulary, C devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.models.variables import MODEL_STATE
from lm.parallel.mesh import constrain, count_shards

if TYPE_CHECKING:
    from lm.objectives.objective import BoundModel

Losses = TypeVar("Losses")


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
    n = n_chunks(T // C, -(-model.config.loss_chunk // max(1, C // shards[1])))
    if n == 1:
        return compute(model, *columns)

    def step(model: BoundModel, carry: None, chunk: tuple[Any, ...]) -> tuple:
        return None, compute(model, *chunk)

    scan = nn.scan(
        nn.remat(step, prevent_cse=False),
        variable_broadcast=("params", MODEL_STATE),
        split_rngs={"params": False, "dropout": True},
    )

    def split(x_BT: jax.Array) -> jax.Array:
        x_BCNT = x_BT.reshape(B, C, n, T // (C * n), *x_BT.shape[2:])
        return jnp.moveaxis(x_BCNT, 2, 0).reshape(n, B, T // n, *x_BT.shape[2:])

    def join(x_NBT: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_NBT.reshape(n, B, C, -1), 0, 2).reshape(B, T)

    first, *others = columns
    first = jax.tree.map(lambda x: constrain(x, "rows", "residual_length", "embed"), first)
    _, losses = scan(model, None, jax.tree.map(split, (first, *others)))
    return jax.tree.map(join, losses)


def n_chunks(length: int, longest: int) -> int:
    """Return the smallest number of equal chunks of at most `longest` columns (0: one chunk)."""
    fewest = -(-length // longest) if longest else 1
    return next(n for n in range(fewest, length + 1) if length % n == 0)
