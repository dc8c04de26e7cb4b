"""The key/value cache of incremental decoding, an explicit value that the model takes and returns.

Shape letters: N layers, B batch, S cache length, T source length, G key/value heads, K head dim.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

KeyValue = tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class Source:
    """What cross-attention sees: every layer's keys and values of an encoded source."""

    keys_NBTGK: jax.Array
    values_NBTGK: jax.Array
    segment_ids_BT: jax.Array


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens so far; `index` of them are filled in every row.

    `segment_ids_BS` is 0 where a slot is padding or not yet written: no query sees it.
    """

    keys_NBSGK: jax.Array
    values_NBSGK: jax.Array
    segment_ids_BS: jax.Array
    index: jax.Array
    source: Source | None = None

    @property
    def own(self) -> KeyValue:
        """Keys and values of the tokens so far, of all layers."""
        return self.keys_NBSGK, self.values_NBSGK

    @property
    def of_source(self) -> KeyValue | None:
        """Keys and values of the source, of all layers."""
        source = self.source
        return None if source is None else (source.keys_NBTGK, source.values_NBTGK)

    def after(
        self,
        own: KeyValue,
        length: int,
        of_source: KeyValue | None,
        source_segments_BT: jax.Array | None,
    ) -> Cache:
        """The cache after `length` more tokens, and the source if the layers have just read it."""
        source = self.source
        if of_source is not None:
            assert source_segments_BT is not None
            source = Source(*of_source, source_segments_BT)
        return Cache(*own, self.segment_ids_BS, self.index + length, source)

    def take(self, rows: jax.Array) -> Cache:
        """The cache whose row i is this one's row `rows[i]`: what a beam search goes on with."""
        return jax.tree.map(
            # Batch is the first axis of segment ids, and the second after the layers.
            lambda x: x if x.ndim == 0 else jnp.take(x, rows, axis=int(x.ndim == 5)),
            self,
        )


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


def write(
    all_layers: KeyValue, layer: jax.Array, start: jax.Array | int, new: KeyValue
) -> tuple[KeyValue, KeyValue]:
    """All layers' keys and values with the `new` ones [B, L, G, K] of a layer from slot `start` on,
    and that layer's alone [B, S, G, K].

    The layers hand all of them on: written in place, where a slice for each layer would be copied.
    """

    def written(all_NBSGK: jax.Array, new_BLGK: jax.Array) -> jax.Array:
        new_1BLGK = new_BLGK[None].astype(all_NBSGK.dtype)
        return lax.dynamic_update_slice(all_NBSGK, new_1BLGK, (layer, 0, start, 0, 0))

    keys, values = map(written, all_layers, new)
    return (keys, values), (keys[layer], values[layer])


def write_segments(cache: Cache, segment_ids_BL: jax.Array) -> Cache:
    """The cache with the segments of the tokens that are about to be written."""
    written = lax.dynamic_update_slice(
        cache.segment_ids_BS, segment_ids_BL.astype(jnp.int32), (0, cache.index)
    )
    return cache.replace(segment_ids_BS=written)  # type: ignore[attr-defined]
