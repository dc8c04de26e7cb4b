"""Random keys whose draws go row by row: what a row gets depends on its number in the batch alone.

A draw of shape [B, …] from such a key is the same numbers whether the batch is computed at once
or in parts (microbatches, pipeline stages): a part's key knows which rows it has. Models draw as
ever and know nothing of it.

A key is four words: those of a plain key, the number of the first row, the step to the next one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl


def by_row(key: jax.Array) -> jax.Array:
    """A key for a whole batch: row i is row i."""
    return _wrapped(key, jnp.array([0, 1], jnp.uint32))


def of_rows(key: jax.Array, first: jax.Array | int, step: int) -> jax.Array:
    """The key for those rows first, first + step, … of the rows that `key` is for."""
    plain, rows = _parts(jax.random.key_data(key))
    first = jnp.asarray(first).astype(jnp.uint32)
    return _wrapped(plain, jnp.stack([rows[0] + rows[1] * first, rows[1] * step]))


def _parts(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.random.wrap_key_data(words[:2], impl="threefry2x32"), words[2:]


def _words(plain: jax.Array, rows: jax.Array) -> jax.Array:
    data = jax.random.key_data(plain)
    return jnp.concatenate([data, jnp.broadcast_to(rows, data.shape)], axis=-1)


def _wrapped(plain: jax.Array, rows: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(_words(plain, rows), impl=_IMPLEMENTATION)


def _seed(seed: Any) -> jax.Array:
    return _words(jax.random.key(seed, impl="threefry2x32"), jnp.array([0, 1], jnp.uint32))


def _split(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    plain, rows = _parts(words)
    return _words(jax.random.split(plain, shape), rows)


def _fold_in(words: jax.Array, number: Any) -> jax.Array:
    plain, rows = _parts(words)
    return _words(jax.random.fold_in(plain, number), rows)


def _random_bits(words: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    plain, (first, step) = _parts(words)
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
