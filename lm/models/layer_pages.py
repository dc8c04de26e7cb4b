"""Pages with keys and values of one layer: their layouts, and attention to them.

Shape letters: B rows, L queries, H heads, G key/value heads, K head dim, N pages, P slots of a
page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import lcm, prod
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.config.registries import MIXERS
from lm.config.rules import POSITION_BIASES
from lm.kernels.paged_attention import PagedRows, paged_attention
from lm.kernels.ragged_attention import ragged_attention, ragged_attention_problems
from lm.kernels.splash_attention import LANES
from lm.models.attention import MixerInputs
from lm.models.cache import heads_first
from lm.models.transformer_config import TransformerConfig
from lm.parallel.mesh import parameter_axes


@flax.struct.dataclass
class LayerPages:
    """Pages of one layer: layout of keys and values, and attention to them.

    Attributes:
        held: keys and values, a tree of arrays: pages, then heads and slots, then elements.
        slot_axis: axis of the slots, 1 or 2; the other of these is the head axis.
    """

    held: Any
    slot_axis: int = flax.struct.field(pytree_node=False)

    @property
    def head_axis(self) -> int:
        """Axis of the heads."""
        return 3 - self.slot_axis

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return int(jax.tree.leaves(self.held)[0].shape[self.slot_axis])

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """Return the sharding by key/value heads, if the mesh divides them."""
        n_heads = jax.tree.leaves(self.held)[0].shape[self.head_axis]
        axes = parameter_axes(mesh.shape, "kv_heads", n_heads)
        return NamedSharding(mesh, PartitionSpec(*[None] * self.head_axis, axes))

    def allocate(self, config: TransformerConfig, n_pages: int, page_size: int) -> Self:
        """Return pages of zeros."""
        zeros = jnp.zeros((n_pages, page_size, config.n_kv_heads, config.head_dim), config.dtype)
        return replace(self, held=self.entries(config, (zeros, zeros)))

    def bytes_of_device(self, mesh: Mesh) -> int:
        """Return the bytes per device."""
        of_device = self.sharding(mesh).shard_shape
        return sum(prod(of_device(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(self))

    def write(
        self, config: TransformerConfig, keys_values: tuple[jax.Array, ...], rows: PagedRows
    ) -> Self:
        """Write the tokens of rows at their offsets; tokens beyond a row's length are dropped.

        Args:
            config: configuration of the stack.
            keys_values: keys and values, [B, L, G, K] each, or one shared array.
            rows: rows.
        """
        write = partial(_write, rows=rows, slot_axis=self.slot_axis)
        held = jax.tree.map(write, self.held, self.entries(config, keys_values))
        return replace(self, held=held)

    def entries(self, config: TransformerConfig, keys_values: tuple[jax.Array, ...]) -> Any:
        """Return keys and values [B, L, G, K] in the pages' layout, with B in place of pages."""
        raise NotImplementedError

    def attend(
        self, config: TransformerConfig, q_BLHK: jax.Array, rows: PagedRows, inputs: MixerInputs
    ) -> jax.Array:
        """Attend to the pages of each row.

        Args:
            config: configuration of the stack.
            q_BLHK: queries.
            rows: rows.
            inputs: mask of the layer, and bias of the scores by distance.

        Returns:
            The output [B, L, H, K].
        """
        raise NotImplementedError


@flax.struct.dataclass
class PlainPages(LayerPages):
    """Pages for plain JAX: keys and values, [N, G, P, K] or [N, P, G, K] each; int8 with scales.

    A token mixer may use one array for both.
    """

    def allocate(self, config: TransformerConfig, n_pages: int, page_size: int) -> Self:
        """Return pages of zeros: a cache of the mixer with pages as rows."""
        cache = MIXERS[config.mixer].init_cache(config, 1, n_pages, page_size)
        held = jax.tree.map(lambda x: jnp.moveaxis(x[0], 2, self.slot_axis), cache)
        return replace(self, held=held)

    def entries(self, config: TransformerConfig, keys_values: tuple[jax.Array, ...]) -> Any:
        """See `LayerPages.entries`."""
        entries = heads_first(config, keys_values)
        return jax.tree.map(lambda x: jnp.moveaxis(x, 2, self.slot_axis), entries)

    def attend(
        self, config: TransformerConfig, q_BLHK: jax.Array, rows: PagedRows, inputs: MixerInputs
    ) -> jax.Array:
        """See `LayerPages.attend`."""
        mask = inputs.mask
        return paged_attention(
            q_BLHK,
            self.held,
            rows,
            scale=config.score_scale,
            softcap=config.attention_softcap,
            window=mask.window if mask.window_BL is None else mask.window_BL,
            is_global=mask.is_global,
            bias_HD=inputs.bias_HLS,
            sinks_H=inputs.sinks_H,
            slot_axis=self.slot_axis,
        )


@flax.struct.dataclass
class KernelPages(LayerPages):
    """Pages for the kernel `ragged_attention`: [N, P, 2G, LANES], keys and values alternating.

    Key/value heads are repeated until the mesh can shard them like the query heads.

    Attributes:
        mesh: mesh that the kernel runs on.
    """

    mesh: Mesh = flax.struct.field(pytree_node=False)

    def entries(self, config: TransformerConfig, keys_values: tuple[jax.Array, ...]) -> Any:
        """See `LayerPages.entries`."""
        n_copies = count_kernel_heads(config, self.mesh) // config.n_kv_heads
        pairs = jnp.repeat(jnp.stack(keys_values, axis=-2), n_copies, axis=-3)
        pairs = jnp.pad(pairs, ((0, 0),) * 4 + ((0, LANES - config.head_dim),))
        pairs = pairs.reshape(*pairs.shape[:2], -1, LANES)
        return pairs.astype(config.cache_dtype or config.dtype)

    def attend(
        self, config: TransformerConfig, q_BLHK: jax.Array, rows: PagedRows, inputs: MixerInputs
    ) -> jax.Array:
        """See `LayerPages.attend`."""
        mask = inputs.mask

        def local(q_BLHK: jax.Array, pages: jax.Array, rows: PagedRows, is_global: Any) -> Any:
            sizes = {"scale": config.score_scale, "softcap": config.attention_softcap}

            def with_window(window: int) -> Callable[..., jax.Array]:
                return lambda: ragged_attention(q_BLHK, pages, rows, window=window, **sizes)

            if is_global is None:
                return with_window(mask.window)()
            return lax.cond(is_global, with_window(0), with_window(mask.window))

        pages_spec = self.sharding(self.mesh).spec
        heads = PartitionSpec(None, None, pages_spec[self.head_axis])
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(heads, pages_spec, PartitionSpec(), PartitionSpec()),
            out_specs=heads,
            check_vma=False,
        )(q_BLHK, self.held, rows, mask.is_global)


def _write(pages: jax.Array, new: jax.Array, rows: PagedRows, slot_axis: int) -> jax.Array:
    """Write new entries [B, …, L, …] at the offsets of their rows, up to the rows' lengths."""
    N, P, L = pages.shape[0], pages.shape[slot_axis], new.shape[slot_axis]
    new = new.astype(pages.dtype)
    is_row_B1 = rows.lengths_B[:, None] > 0
    if rows.starts_page:
        index_Bm = rows.offsets_B[:, None] // P + jnp.arange(L // P)
        is_used_Bm = is_row_B1 & (index_Bm * P < rows.lengths_B[:, None])
        whole = new.reshape(*new.shape[:slot_axis], L // P, P, *new.shape[slot_axis + 1 :])
        whole = jnp.moveaxis(whole, slot_axis, 1)
        return pages.at[_ids(rows, index_Bm, is_used_Bm, N)].set(whole, mode="drop")
    slots_BL = rows.offsets_B[:, None] + jnp.arange(L)
    is_used_BL = is_row_B1 & (slots_BL < rows.lengths_B[:, None])
    ids_BL = _ids(rows, slots_BL // P, is_used_BL, N)
    at = (ids_BL, *[slice(None)] * (slot_axis - 1), slots_BL % P)
    return pages.at[at].set(jnp.moveaxis(new, slot_axis, 1), mode="drop")


def _ids(rows: PagedRows, index: jax.Array, is_used: jax.Array, n_pages: int) -> jax.Array:
    """Return page numbers; `n_pages`, which is out of range, where nothing is written."""
    last = rows.tables_BM.shape[1] - 1
    ids = jnp.take_along_axis(rows.tables_BM, jnp.clip(index, 0, last), axis=1)
    return jnp.where(is_used, ids, n_pages)


Pages = tuple[LayerPages, ...]  # of all layers


def empty_pages(
    config: TransformerConfig, n_pages: int, page_size: int, mesh: Mesh, has_prefix: bool = False
) -> Pages:
    """Return zeroed pages of all layers, in the layout that is best for a mesh.

    Args:
        config: configuration of the stack, prepared for decoding.
        n_pages: number of pages.
        page_size: slots of a page.
        mesh: mesh.
        has_prefix: prompt tokens attend to each other in both directions.
    """
    # TPUs write whole slots in place; other layouts make the compiler copy all pages twice.
    none: LayerPages = PlainPages(None, 1 if _platform(mesh) == "tpu" else 2)
    if not any(page_kernel_problems(config, mesh, has_prefix)):
        none = KernelPages(None, 1, mesh)
    return tuple(none.allocate(config, n_pages, page_size) for _ in range(config.n_layers))


def _platform(mesh: Mesh) -> str:
    return str(mesh.devices.flat[0].platform)


def count_kernel_heads(config: TransformerConfig, mesh: Mesh) -> int:
    """Return the number of key/value heads in `KernelPages`, after repetition."""
    return lcm(config.n_kv_heads, _head_shards(config, mesh))


def _head_shards(config: TransformerConfig, mesh: Mesh) -> int:
    axes = parameter_axes(mesh.shape, "heads", config.n_heads) or ()
    return prod(mesh.shape[axis] for axis in axes)


def page_kernel_problems(config: TransformerConfig, mesh: Mesh, has_prefix: bool) -> Iterator[str]:
    """Yield what prevents the TPU kernel from reading pages, to follow "cannot be used with".

    Args:
        config: configuration of the stack, prepared for decoding.
        mesh: mesh.
        has_prefix: prompt tokens attend to each other in both directions.
    """
    if config.mixer != "attention":
        yield f"--config.model.mixer={config.mixer}"
    if (platform := _platform(mesh)) != "tpu":
        yield f"{platform} devices"
    if config.positions in POSITION_BIASES:
        yield f"--config.model.positions={config.positions}"
    if config.attention_sinks:
        yield "--config.model.attention_sinks=True"
    if config.window_chunks:
        yield "--config.model.window_chunks=True"
    if has_prefix:
        yield "prefixes, whose tokens attend to each other in both directions"
    shards = _head_shards(config, mesh)
    heads = config.n_heads // shards, count_kernel_heads(config, mesh) // shards
    dtypes = str(jnp.dtype(config.dtype)), config.cache_dtype or str(jnp.dtype(config.dtype))
    yield from ragged_attention_problems(*heads, config.head_dim, *dtypes)
