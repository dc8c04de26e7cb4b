"""Gradient accumulation over microbatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lm.parallel.mesh import unpack_row_key, wrap_row_key

if TYPE_CHECKING:
    from lm.train_step import Between

Tree = Any


def accumulate(
    function: Callable[[Between, Tree, jax.Array], tuple[Tree, Between]],
    n: int,
    before: Between,
    batch: Tree,
    rng: jax.Array,
) -> tuple[Tree, Between]:
    """Sum a function over `n` microbatches; also return the state passed to the next batch.

    The carry is split by rows like the batch; model state is passed from each microbatch to the
    next.

    Args:
        function: function of the previous state, a microbatch and its random key; returns values to
            sum and the next state.
        n: number of microbatches.
        before: state after the previous batch.
        batch: arrays [B, …].
        rng: per-row key of the batch.
    """
    # Row r goes to microbatch r mod n, so each device keeps its rows on any mesh.
    parts = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1),
        (before.carry, batch),
    )

    def add(so_far: tuple[Tree, Tree], part: tuple[Tree, jax.Array]) -> tuple[Tree, Tree]:
        (total, model_state), ((carry, batch), index) = so_far, part
        passed = before._replace(carry=carry, model_state=model_state)
        sums, after = function(passed, batch, select_rows(rng, index, n))
        return (jax.tree.map(jnp.add, total, sums), after.model_state), after.carry

    first_carry, first_batch = jax.tree.map(lambda x: x[0], parts)
    shapes, _ = jax.eval_shape(function, before._replace(carry=first_carry), first_batch, rng)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    start = (zeros, before.model_state)
    (sums, model_state), carries = jax.lax.scan(add, start, (parts, jnp.arange(n)))
    carry = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), carries)
    return sums, before._replace(carry=carry, model_state=model_state)


def select_rows(key: jax.Array, first: jax.Array | int, step: int) -> jax.Array:
    """Return the per-row key of rows first, first + step, … of a batch."""
    plain, rows = unpack_row_key(jax.random.key_data(key))
    first = jnp.asarray(first).astype(jnp.uint32)
    return wrap_row_key(plain, jnp.stack([rows[0] + rows[1] * first, rows[1] * step]))
