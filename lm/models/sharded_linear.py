"""Products of linear maps on accelerators and on meshes.

A TPU or GPU accumulates a product in float32 and rounds its sums to the dtype in which they are
used, before they are stored or sent: partial sums of several devices are added in that dtype. A CPU
multiplies fastest into float32.

With sequence parallelism the residual stream is also sharded along the length over the tensor
parallel devices (Korthikanti et al. 2022, §4.2.2). A map that reads it gathers its input along the
length, a map that writes to it scatters its summed output, and their gradients do the reverse.
Gathered arrays are not kept for the backward pass, which gathers them again.

On a TPU torus sums over devices do not overlap with computation, and the scheduler would delay
those of kernel gradients to the end of a layer, holding all of them unsharded until then. There the
gradient of a sharded kernel is summed before that of x is used, and a large one in parts.
Gradients of x that are scattered are left to the compiler, which first adds those of several maps.

Shape letters: B batch, L length, D inputs, F outputs; instead of B and L, T tokens.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.kernels.dense import matmul_backward, matmul_forward
from lm.models.vocabulary_blocks import of_block
from lm.parallel.mesh import PARAMETERS, constrain, count_shards, current_mesh

STREAM = "embed"  # width of the residual stream
PART = 2**27  # bytes of a gradient summed over devices at a time
MOST_PARTS = 8
LANES = 128  # of a TPU


class Map(NamedTuple):
    """Settings of a linear map.

    Attributes:
        dtype: compute dtype.
        out_dtype: dtype of the sums of the product.
        grad_dtype: dtype of the sums of the gradient of x.
        transposed: whether the kernel is stored as [F, D].
        rows: logical axis of the rows.
        gathers: x is part of the residual stream, and is gathered along the length.
        scatters: the product is part of it, and is scattered along the length.
        parts: number of parts of the kernel's gradient, each completed before the next and all
            before the gradient of x is used; 0: in any order.
        cuts_x: split the columns of x; otherwise those of the output's gradient.
    """

    dtype: jnp.dtype
    out_dtype: jnp.dtype
    grad_dtype: jnp.dtype
    transposed: bool
    rows: str
    gathers: bool
    scatters: bool
    parts: int
    cuts_x: bool


def product_on_mesh(
    x: jax.Array,
    kernel: jax.Array,
    names: tuple[str, str],
    dtypes: tuple,
    transposed: bool,
) -> jax.Array:
    """Multiply the last dimension of x by a kernel, inside `use_mesh`.

    Args:
        x: [..., D].
        kernel: float32 [D, F], or [F, D] if `transposed`.
        names: logical axes D and F.
        dtypes: compute dtype, and the dtype in which the product is used.
        transposed: whether the kernel is stored as [F, D].

    Returns:
        The product, [B, L, F] if the length is sharded: flattened with the rows, it would have to
        be gathered first. Otherwise [T, F].
    """
    mesh = current_mesh()
    assert mesh is not None
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    dtype, out_dtype = dtypes
    if names[1] == "vocab":
        kernel = of_block(kernel, 0 if transposed else 1)
    sums = (jnp.float32, jnp.float32) if on_cpu else (out_dtype, dtype)
    keeps_length = x.ndim == 3 and count_shards("residual_length") > 1
    is_cut = keeps_length and count_shards("residual_length") > count_shards("length")
    # Kernels from residual stream to residual stream have no dimension on the tensor axis.
    is_cut = is_cut and any("tensor" in PARAMETERS[name] for name in names)
    rows = "rows" if "vocab" in names else "batch"
    gathers, scatters = (is_cut and name == STREAM for name in names)
    cuts_x, parts = names[0] != STREAM, 0
    is_torus = mesh.devices.flat[0].platform == "tpu" and mesh.shape["slice"] == 1
    if is_torus and not gathers and prod(mesh.shape[axis] for axis in PARAMETERS[STREAM]) > 1:
        width = kernel.shape[0 if cuts_x != transposed else 1]
        parts = _n_parts(width, 4 * kernel.size) if mesh.shape["tensor"] == 1 else 1
    x = x if keeps_length else x.reshape(-1, x.shape[-1])
    how = Map(dtype, *sums, transposed, rows, gathers, scatters, parts, cuts_x)
    return _product(x, kernel, how)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, kernel: jax.Array, how: Map) -> jax.Array:
    return _forward(x, kernel, how)[0]


def _forward(x: jax.Array, kernel: jax.Array, how: Map) -> tuple[jax.Array, tuple]:
    part = x.astype(how.dtype)
    whole = _whole(part, how) if how.gathers else part
    y, (_, kernel, _) = matmul_forward(whole, kernel, how.dtype, how.transposed, how.out_dtype)
    # Save x itself: by default the compiler would save the gathered array. An empty array carries
    # the dtype of the gradient of x.
    part = _part(part, how) if how.gathers else part
    residuals = part, kernel, jnp.zeros((0,), x.dtype)
    return (_part(y, how) if how.scatters else y), residuals


def _backward(how: Map, residuals: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, like_x = residuals
    g = g.astype(how.dtype)
    g = _whole(g, how) if how.scatters else g
    x = _whole(_part(x, how), how) if how.gathers else x
    dx, dkernel = matmul_backward(how.dtype, how.transposed, (x, kernel, like_x), g, how.grad_dtype)
    dx = _part(dx, how) if how.gathers else dx
    if not how.parts:
        return dx, dkernel
    if how.parts > 1:
        dkernel = _in_parts(x, g, how)
    return jax.lax.optimization_barrier((dx, dkernel))


_product.defvjp(_forward, _backward)


def _n_parts(width: int, n_bytes: int) -> int:
    """Return the number of parts of a gradient, each a multiple of whole lanes."""
    most = min(MOST_PARTS, -(-n_bytes // PART))
    return next((n for n in range(most, 1, -1) if width % (n * LANES) == 0), 1)


def _in_parts(x: jax.Array, g: jax.Array, how: Map) -> jax.Array:
    """Return the gradient of the kernel, float32, computed for a few columns at a time."""
    x, g = (a if a.ndim == 3 else a[None] for a in (x, g))
    axes, parts = "fd" if how.transposed else "df", []
    width = (x if how.cuts_x else g).shape[-1] // how.parts
    for i in range(how.parts):
        own = slice(i * width, (i + 1) * width)
        factors = (x[..., own], g) if how.cuts_x else (x, g[..., own])
        part = jnp.einsum(f"btd,btf->{axes}", *factors, preferred_element_type=jnp.float32)
        part, x, g = jax.lax.optimization_barrier((part, x, g))
        parts.append(part)
    return jnp.concatenate(parts, axes.index("d" if how.cuts_x else "f"))


def _whole(x_BLD: jax.Array, how: Map) -> jax.Array:
    return constrain(x_BLD, how.rows, "length", STREAM)


def _part(x_BLD: jax.Array, how: Map) -> jax.Array:
    return constrain(x_BLD, how.rows, "residual_length", STREAM)
