"""Decoding cache of a Transformer: a pytree that the model takes and returns.

Shape letters: N layers, B batch, S cache length, T source length, G key/value heads, K head dim.
"""

from __future__ import annotations

from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from lm.config.registries import MIXERS
from lm.models.transformer_config import LayerType, TransformerConfig

Tree = TypeVar("Tree")
Layer = jax.Array | int | tuple[()]  # index of a layer in a cache; () if it has one layer
CrossKeyValue = tuple[jax.Array, jax.Array]  # [B, T, G, K] each
# Keys and values, [B, G, S, K] each, or one shared array; int8 ones with scales, [B, G, S, 1].
KeyValueCache = Any
INT8_MAX = 127


@flax.struct.dataclass
class CrossCache:
    """Keys and values of an encoded source for all layers, heads first, and its segment ids.

    They are [N, B, G, T, K] each, or, in an unrolled stack, [B, G, T, K] for each layer. `copied`
    is the source as read by `lm/models/copying.py`, in a model that copies.
    """

    keys_values: Any
    segment_ids_BS: jax.Array
    copied: Any = None


@flax.struct.dataclass
class Cache:
    """Caches of all token mixers of a stack.

    Attributes:
        mixers: for each mixer name, a pytree defined by the mixer, whose leaves are [N, B, …], N
            being the number of layers with this mixer (`TokenMixer.init_cache`); in an unrolled
            stack one per layer, [B, …]: XLA copies what it both updates and slices.
        segment_ids_BS: segment ids of the cached tokens; 0 where a slot is padding or not yet
            written, which no query attends to.
        index: number of slots written in each row.
        source: keys and values of cross-attention.
        row_axis: axis of the rows in `mixers` and `source`; 0 in an unrolled stack.
    """

    mixers: dict[str, Any]
    segment_ids_BS: jax.Array
    index: jax.Array
    source: CrossCache | None = None
    row_axis: int = flax.struct.field(pytree_node=False, default=1)

    def advance(
        self,
        config: TransformerConfig,
        mixers: dict[str, Any],
        length: int,
        source: Any,
        source_segments_BS: jax.Array | None,
    ) -> Cache:
        """Return the cache after more tokens, with the source if it was just encoded.

        Args:
            config: configuration of the stack.
            mixers: caches of the token mixers.
            length: number of tokens.
            source: keys and values of the source, [..., B, T, G, K], if it was just encoded.
            source_segments_BS: its segment ids.
        """
        cross = self.source
        if source is not None:
            assert source_segments_BS is not None
            cross = CrossCache(heads_first(config, source), source_segments_BS)
        index = self.index + length
        return self.replace(mixers=mixers, index=index, source=cross)  # type: ignore[attr-defined,no-any-return]

    def take(self, rows: jax.Array) -> Cache:
        """Return a cache whose row i is row `rows[i]` of this one, as beam search needs."""

        def take(axis: int, tree: Tree) -> Tree:
            return jax.tree.map(lambda x: jnp.take(x, rows, axis=axis), tree)

        source = self.source
        if source is not None:
            held = take(self.row_axis, source.keys_values)
            source = CrossCache(held, *take(0, (source.segment_ids_BS, source.copied)))
        mixers, segments_BS = take(self.row_axis, self.mixers), take(0, self.segment_ids_BS)
        return Cache(mixers, segments_BS, self.index, source, self.row_axis)

    def with_segments(self, segment_ids_BL: jax.Array) -> Cache:
        """Return the cache with the segment ids of the tokens about to be written."""
        written = lax.dynamic_update_slice(
            self.segment_ids_BS, segment_ids_BL.astype(jnp.int32), (0, self.index)
        )
        return self.replace(segment_ids_BS=written)  # type: ignore[attr-defined,no-any-return]


def write_layer(
    cache: Tree,
    layer: Layer,
    new: Tree,
    start: jax.Array | int | None = None,
    axis: int = 1,
) -> tuple[Tree, Tree]:
    """Write one layer's new cache entries, in place where the compiler can.

    All layers pass on the whole cache: slices for each layer would be copied.

    Args:
        cache: pytree of arrays [N, B, …], or [B, …].
        layer: number of the layer, or ().
        new: the same pytree with arrays [B, L, …]; without `start` [B, …].
        start: first slot of the L new entries; None: the whole layer is written.
        axis: axis of the L new entries.

    Returns:
        The cache, and the entries of only this layer, [B, …].
    """

    def write_leaf(cache_NB: jax.Array, new_B: jax.Array) -> jax.Array:
        layers = [layer] * (cache_NB.ndim - new_B.ndim)
        at: list[Any] = layers + [0] * new_B.ndim
        if start is not None:
            at[len(layers) + axis] = start
        new_B = jnp.expand_dims(new_B, range(len(layers)))
        return lax.dynamic_update_slice(cache_NB, new_B.astype(cache_NB.dtype), at)

    cache = jax.tree.map(write_leaf, cache, new)
    return cache, jax.tree.map(lambda x: x[layer], cache)


def cache_indices(layer_types: tuple[LayerType, ...]) -> list[int]:
    """Return the index of each layer among those with the same token mixer."""
    mixers = [t.mixer for t in layer_types]
    return [mixers[:i].count(mixer) for i, mixer in enumerate(mixers)]


def init_cache(config: TransformerConfig, n_layers: int, batch: int, length: int) -> Cache:
    """Return an empty cache for `batch` rows of up to `length` tokens."""
    types = config.layer_types(n_layers)
    mixers = [t.mixer for t in types]

    def empty(name: str) -> Any:
        make, n = MIXERS[name].init_cache, mixers.count(name)
        if types[0].scannable:
            return make(config, n, batch, length)
        return tuple(jax.tree.map(lambda x: x[0], make(config, 1, batch, length)) for _ in range(n))

    return Cache(
        mixers={name: empty(name) for name in sorted(set(mixers))},
        segment_ids_BS=jnp.zeros((batch, length), jnp.int32),
        index=jnp.zeros((), jnp.int32),
        row_axis=int(types[0].scannable),
    )


def heads_first(config: TransformerConfig, keys_values: tuple[jax.Array, ...]) -> KeyValueCache:
    """Return keys and values [..., S, G, K] in cache layout: [..., G, S, K], in the cache's dtype.

    Each int8 vector of a head has its own scale.
    """

    def stored(x: jax.Array) -> Any:
        x = x.swapaxes(-3, -2)
        if config.cache_dtype != "int8":
            return x.astype(config.cache_dtype or config.dtype)
        scale = jnp.abs(x.astype(jnp.float32)).max(-1, keepdims=True) / INT8_MAX
        return jnp.round(x / jnp.maximum(scale, 1e-30)).astype(jnp.int8), scale

    return jax.tree.map(stored, keys_values)
