"""Lookup of embeddings in a sharded table.

Shape letters: B batch, L length, V vocabulary, D model.
"""

from __future__ import annotations

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lm.parallel.mesh import (
    LENGTH_AXIS,
    ROW_AXES,
    activation_sharding,
    count_shards,
    current_mesh,
    parameter_sharding,
)

Axes = tuple[str, ...]


def embedding_lookup(table_VD: jax.Array, names: tuple[str, str], ids_BL: jax.Array) -> jax.Array:
    """Look up embeddings in a sharded table, with reduce-scattered gradients.

    Args:
        table_VD: embedding table.
        names: logical axis names of the table.
        ids_BL: token ids; ids of another rank than 2 are looked up by `jnp.take`.

    Returns:
        The embeddings [B, L, D].
    """
    mesh = current_mesh()
    if mesh is None or ids_BL.ndim != 2:
        return jnp.take(table_VD, ids_BL, axis=0)
    table = parameter_sharding(mesh, names, table_VD.shape).spec
    row_axes, width_axes = (_axes_of_several(mesh, axes) for axes in table)
    if not row_axes and not width_axes:
        return jnp.take(table_VD, ids_BL, axis=0)
    return sharded_lookup(table_VD, ids_BL, mesh, table, row_axes, width_axes)


def _axes_of_several(mesh: Mesh, axes: tuple[str, ...] | str | None) -> tuple[str, ...]:
    """Return the mesh axes of a dimension that have more than one device."""
    named = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(axis for axis in named if mesh.shape[axis] > 1)


def sharded_lookup(
    table_VD: jax.Array,
    ids_BL: jax.Array,
    mesh: Mesh,
    table: PartitionSpec,
    row_axes: Axes,
    width_axes: Axes,
) -> jax.Array:
    """Look up embeddings in a sharded table, with reduce-scattered gradients.

    The compiler would all-reduce the gradient of the whole table. Here each device all-gathers the
    width of its rows and looks up the tokens in them; the backward pass reduce-scatters the
    gradient to the shards of the width.

    Args:
        table_VD: embedding table.
        ids_BL: token ids.
        mesh: mesh of the step.
        table: sharding of the table.
        row_axes: mesh axes with several devices that shard the rows.
        width_axes: mesh axes with several devices that shard the width.

    Returns:
        The embeddings [B, L, D].
    """

    def on_device(table_VD: jax.Array, ids_BL: jax.Array) -> jax.Array:
        table_VD = _gather_width(table_VD, width_axes)
        if not row_axes:
            return jnp.take(table_VD, ids_BL, axis=0)
        ids_BL -= lax.axis_index(row_axes) * len(table_VD)
        is_local_BL = (ids_BL >= 0) & (ids_BL < len(table_VD))
        rows_BLD = jnp.take(table_VD, jnp.where(is_local_BL, ids_BL, 0), axis=0)
        rows_BLD = jnp.where(is_local_BL[..., None], rows_BLD, 0)
        if scattered:
            return lax.psum_scatter(rows_BLD, row_axes, scatter_dimension=1, tiled=True)
        return lax.psum(rows_BLD, row_axes)

    id_axes = [
        axes if size % prod(mesh.shape[axis] for axis in axes) == 0 else None
        for axes, size in zip((ROW_AXES, (LENGTH_AXIS,)), ids_BL.shape, strict=True)
    ]
    # If the same devices shard the length of the residual stream, each gets its shard.
    length_axes = activation_sharding("residual_length").spec[0] or ()
    scattered = (
        bool(row_axes)
        and length_axes == (LENGTH_AXIS, *row_axes)
        and ids_BL.shape[1] % count_shards("residual_length") == 0
    )
    out_axes = (id_axes[0], length_axes if scattered else id_axes[1])
    # check_vma does not know that all devices gathered the same values.
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(table, PartitionSpec(*id_axes)),
        out_specs=PartitionSpec(*out_axes, None),
        check_vma=False,
    )(table_VD, ids_BL)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_width(shard_VD: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return lax.all_gather(shard_VD, axes, axis=1, tiled=True) if axes else shard_VD


def _gather_width_forward(shard_VD: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, None]:
    return _gather_width(shard_VD, axes), None


def _gather_width_backward(axes: tuple[str, ...], _: None, g_VD: jax.Array) -> tuple[jax.Array]:
    if not axes:
        return (g_VD,)
    # TPUs reduce-scatter the outer dimension; for an inner one they would all-reduce and slice.
    return (lax.psum_scatter(g_VD.T, axes, scatter_dimension=0, tiled=True).T,)


_gather_width.defvjp(_gather_width_forward, _gather_width_backward)
