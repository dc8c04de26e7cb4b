"""The key/value cache of incremental decoding, an explicit value that the model takes and returns.

Shape letters: N layers, B batch, S cache length, G key/value heads, K head dim.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens so far; `index` of them are filled in every row.

    `segment_ids_BS` is 0 where a slot is padding or not yet written: no query sees it.
    """

    keys_NBSGK: jax.Array
    values_NBSGK: jax.Array
    segment_ids_BS: jax.Array
    index: jax.Array


def empty_cache(
    n_layers: int, batch: int, length: int, n_kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> Cache:
    """A cache with room for `length` tokens a row."""
    shape = (n_layers, batch, length, n_kv_heads, head_dim)
    return Cache(
        keys_NBSGK=jnp.zeros(shape, dtype),
        values_NBSGK=jnp.zeros(shape, dtype),
        segment_ids_BS=jnp.zeros((batch, length), jnp.int32),
        index=jnp.zeros((), jnp.int32),
    )
