"""Rows of a table that lies over the mesh, and the gradient summed into the parts of the table.

The compiler, left to itself, sums the gradient of the whole table on every device. Here each device
gathers the width of its rows of the table, looks up its own tokens among them, and in the backward
pass scatters the sum back to where the width lies.

Shape letters: B batch, L length, V rows, D width.
"""

from __future__ import annotations

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lm.parallel.sharding import LENGTH_AXIS, ROW_AXES, current_mesh, parameter_sharding


def look_up(table_VD: jax.Array, names: tuple[str, str], ids_BL: jax.Array) -> jax.Array:
    """The row of each id, [B, L, D]; `names` are the logical axes of the table."""
    mesh = current_mesh()
    if mesh is None or ids_BL.ndim != 2:
        return jnp.take(table_VD, ids_BL, axis=0)
    table = parameter_sharding(mesh, names, table_VD.shape).spec
    over_rows, over_width = (_divided(mesh, axes) for axes in table)
    if not over_rows and not over_width:
        return jnp.take(table_VD, ids_BL, axis=0)

    def of_device(table_VD: jax.Array, ids_BL: jax.Array) -> jax.Array:
        table_VD = _gathered(table_VD, over_width)
        if not over_rows:
            return jnp.take(table_VD, ids_BL, axis=0)
        ids_BL -= lax.axis_index(over_rows) * len(table_VD)
        mine_BL = (ids_BL >= 0) & (ids_BL < len(table_VD))
        rows_BLD = jnp.take(table_VD, jnp.where(mine_BL, ids_BL, 0), axis=0)
        return lax.psum(jnp.where(mine_BL[..., None], rows_BLD, 0), over_rows)

    lies = [
        axes if size % prod(mesh.shape[axis] for axis in axes) == 0 else None
        for axes, size in zip((ROW_AXES, (LENGTH_AXIS,)), ids_BL.shape, strict=True)
    ]
    # The check of what varies over which axis does not know that all gathered the same.
    return jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(table, PartitionSpec(*lies)),
        out_specs=PartitionSpec(*lies, None),
        check_vma=False,
    )(table_VD, ids_BL)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(part_VD: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return lax.all_gather(part_VD, axes, axis=1, tiled=True) if axes else part_VD


def _forward(part_VD: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, None]:
    return _gathered(part_VD, axes), None


def _backward(axes: tuple[str, ...], _: None, sum_VD: jax.Array) -> tuple[jax.Array]:
    if not axes:
        return (sum_VD,)
    # A TPU scatters the outer dimension; of the inner one it would sum everything, then cut.
    return (lax.psum_scatter(sum_VD.T, axes, scatter_dimension=0, tiled=True).T,)


_gathered.defvjp(_forward, _backward)


def _divided(mesh: Mesh, axes: tuple[str, ...] | str | None) -> tuple[str, ...]:
    named = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(axis for axis in named if mesh.shape[axis] > 1)
