"""The key/value cache of incremental decoding, an explicit value that the model takes and returns.

Shape letters: N layers, B batch, S cache length, T source length, G key/value heads, K head dim.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

KeyValue = tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class Cached:
    """Keys and values of one layer, or of all: of its own tokens so far, and of the source."""

    own: KeyValue | None = None
    source: KeyValue | None = None


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
    def layers(self) -> Cached:
        """What the layers have, their number the first axis."""
        own, source = (self.keys_NBSGK, self.values_NBSGK), self.source
        return Cached(own, None if source is None else (source.keys_NBTGK, source.values_NBTGK))

    def after(self, layers: Cached, length: int, source_segments_BT: jax.Array | None) -> Cache:
        """The cache after `length` more tokens, and the source if the layers have just read it."""
        assert layers.own is not None
        source = self.source
        if layers.source is not None:
            assert source_segments_BT is not None
            source = Source(*layers.source, source_segments_BT)
        return Cache(*layers.own, self.segment_ids_BS, self.index + length, source)

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


def write_segments(cache: Cache, segment_ids_BL: jax.Array) -> Cache:
    """The cache with the segments of the tokens that are about to be written."""
    written = jax.lax.dynamic_update_slice(
        cache.segment_ids_BS, segment_ids_BL.astype(jnp.int32), (0, cache.index)
    )
    return cache.replace(segment_ids_BS=written)  # type: ignore[attr-defined]
