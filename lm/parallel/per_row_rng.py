"""Per-row random keys: what a row draws depends only on its index in the batch.

A draw of shape [B, …] from such a key gives the same numbers whether the batch is computed at once
or in parts (microbatches, pipeline stages): the key of a part holds the indices of its rows. Models
use it like any JAX key.

A key is four words: the two of a Threefry key, the index of the first row, and the row stride.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl


def per_row_key(key: jax.Array) -> jax.Array:
    """Return the per-row key of a whole batch."""
    return _wrap(key, jnp.array([0, 1], jnp.uint32))


def select_rows(key: jax.Array, first: jax.Array | int, step: int) -> jax.Array:
    """Return the key of rows first, first + step, … of the rows that `key` is for."""
    plain, rows = _unpack(jax.random.key_data(key))
    first = jnp.asarray(first).astype(jnp.uint32)
    return _wrap(plain, jnp.stack([rows[0] + rows[1] * first, rows[1] * step]))


def _unpack(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.random.wrap_key_data(words[:2], impl="threefry2x32"), words[2:]


def _pack(plain: jax.Array, rows: jax.Array) -> jax.Array:
    data = jax.random.key_data(plain)
    return jnp.concatenate([data, jnp.broadcast_to(rows, data.shape)], axis=-1)


def _wrap(plain: jax.Array, rows: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(_pack(plain, rows), impl=_IMPLEMENTATION)


def _seed(seed: Any) -> jax.Array:
    return _pack(jax.random.key(seed, impl="threefry2x32"), jnp.array([0, 1], jnp.uint32))


def _split(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    plain, rows = _unpack(words)
    return _pack(jax.random.split(plain, shape), rows)


def _fold_in(words: jax.Array, number: Any) -> jax.Array:
    plain, rows = _unpack(words)
    return _pack(jax.random.fold_in(plain, number), rows)


def _random_bits(words: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    plain, (first, step) = _unpack(words)
    dtype = jnp.dtype(f"uint{bit_width}")
    if not shape:
        return jax.random.bits(plain, (), dtype)
    rows = first + step * jnp.arange(shape[0], dtype=jnp.uint32)
    return jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(plain, row), shape[1:], dtype))(
        rows
    )


_IMPLEMENTATION: Any = define_prng_impl(
    key_shape=(4,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="by_row",
    tag="rows",
)
