"""Linear maps and look-ups of models with quantized kernels.

XLA's CPU backend would write out a whole floating-point kernel in each step, ten times slower than
the product itself. Here it is converted tile by tile, which stays in the processor's cache.
Other backends convert as they multiply.

Shape letters: T tokens, I inputs, O outputs, G groups of inputs, P half of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.models.layers import Embedding, Linear
from lm.models.quantized_kernel import QuantizedKernel
from lm.parallel.mesh import current_mesh

TILE = 2**18  # elements of a kernel converted at a time


def with_quantized(method: Callable, args: Any, options: Any, context: Any) -> Any:
    """Run a layer's method directly on a quantized kernel (for `nn.intercept_methods`)."""
    module, name = context.module, context.method_name
    box = quantized_kernel(module)
    of_linear = type(module) is Linear
    if box is None:
        return method(*args, **options)
    if name == "__call__" and not of_linear:
        return lookup(box, *args)
    mesh = current_mesh()
    if (mesh is None or mesh.size == 1) and jax.default_backend() == "cpu":
        if name == "product" and of_linear:
            return tiled_product(args[0], box, module.dtype, len(module.out_shape))
        if name == "attend":
            y_TO = tiled_product(args[0], box, module.dtype, 0)
            return y_TO.reshape(*args[0].shape[:-1], -1)
    return method(*args, **options)


def quantized_kernel(module: nn.Module) -> QuantizedKernel | None:
    """Return the quantized kernel or table of a layer, or None."""
    name = {Linear: "kernel", Embedding: "embedding"}.get(type(module))
    if name is None or not module.has_variable("params", name):
        return None
    box: Any = module.get_variable("params", name)
    return box if isinstance(box, QuantizedKernel) else None


def lookup(table: QuantizedKernel, ids_BL: jax.Array) -> jax.Array:
    """Return the embeddings [B, L, D]; only their rows are converted."""
    rows: Any = jax.tree.map(lambda x: jnp.take(x, ids_BL, axis=0), table)
    return rows.unbox()


def tiled_product(x: jax.Array, kernel: QuantizedKernel, dtype: Any, n_out: int) -> jax.Array:
    """Multiply by a kernel, converting a tile of outputs at a time.

    Args:
        x: [..., I].
        kernel: kernel with input and output axes, or table [O, I].
        dtype: compute dtype of an 8-bit kernel. A 4-bit kernel is multiplied in float32, to which
            a CPU converts faster.
        n_out: number of the kernel's output axes; 0 for a table.

    Returns:
        The product [T, O] float32, leading dimensions flattened.
    """
    x_TI = x.reshape(-1, x.shape[-1])
    last = -1 if n_out else 0
    parts = _as_matrix(kernel, n_out)
    n_rows = parts[0].shape[last]
    size = min(n_rows, max(1, TILE // x_TI.shape[1]))
    product = partial(_products[kernel.values.dtype == jnp.uint8], x_TI, dtype, bool(n_out))

    def tile(start: jax.Array | int, size: int) -> jax.Array:
        cut = partial(jax.lax.dynamic_slice_in_dim, axis=last)
        return product(*(cut(part, start, size) for part in parts))

    n = n_rows // size
    tiles = jax.lax.map(lambda i: tile(i * size, size), jnp.arange(n))
    y_TO = tiles.swapaxes(0, 1).reshape(x_TI.shape[0], n * size)  # T may be symbolic
    rest = n_rows - n * size
    return jnp.concatenate([y_TO, tile(n * size, rest)], 1) if rest else y_TO


def _as_matrix(kernel: QuantizedKernel, n_out: int) -> tuple[jax.Array, jax.Array]:
    """Return values and scales as [I, O] or, in 4 bits, [G, P, O]; tables have O first."""
    values, scale = kernel.values, kernel.scale
    if not n_out:
        return values, scale
    n = prod(values.shape[-n_out:])
    if values.dtype == jnp.uint8:
        return values.reshape(*values.shape[:2], n), scale.reshape(len(scale), 1, n)
    return values.reshape(-1, n), scale.reshape(1, n)


def _product_of_8_bits(
    x_TI: jax.Array, dtype: Any, inputs_first: bool, values: jax.Array, scale: jax.Array
) -> jax.Array:
    axes = "ti,io->to" if inputs_first else "ti,oi->to"
    operands = x_TI.astype(dtype), values.astype(dtype)
    return jnp.einsum(axes, *operands, preferred_element_type=jnp.float32) * scale.reshape(1, -1)


def _product_of_4_bits(
    x_TI: jax.Array, dtype: Any, inputs_first: bool, values: jax.Array, scale: jax.Array
) -> jax.Array:
    del dtype
    axes = "ti,io->to" if inputs_first else "ti,oi->to"
    n_groups, half = values.shape[:2] if inputs_first else values.shape[1:]
    x_TGHP = x_TI.astype(jnp.float32).reshape(-1, n_groups, 2, half)
    y_TO = jnp.zeros(())
    for i, part in enumerate((values & 15, values >> 4)):
        kernel = (part.astype(jnp.int32) - 8).astype(jnp.float32) * scale.astype(jnp.float32)
        n_out = values.shape[-1 if inputs_first else 0]
        matrix = kernel.reshape(-1, n_out) if inputs_first else kernel.reshape(n_out, -1)
        x = x_TGHP[:, :, i].reshape(x_TI.shape[0], -1)
        y_TO += jnp.einsum(axes, x, matrix, preferred_element_type=jnp.float32)
    return y_TO


_products = {False: _product_of_8_bits, True: _product_of_4_bits}
