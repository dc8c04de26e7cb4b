"""Kernels and tables in 8 or 4 bits, dequantized layer by layer where the model reads them.

In 8 bits there is one scale per vector along the contracted axes, in 4 bits one per group of about
32 elements of it, chosen for the least squared error. Qwix has the same formats, but its
calibration supports only its own tensors, not our roles, stacked layers and shardings.

Shape letters: G groups along the contracted axes, P bytes of a group, each two 4-bit elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lm.models.cache import INT8_MAX
from lm.models.frozen import is_frozen
from lm.models.variables import Kind, ParamInfo

QUANTIZED = frozenset({Kind.MATRIX, Kind.HEAD, Kind.EMBEDDING})
BITS = {"int8": 8, "int4": 4}  # of `--config.decode.weights`
SMALLEST_GROUP = 32
# The scale of a group is its element of largest magnitude divided by one of these: -8 and 7
# represent that element exactly, others clip it to represent the rest better. A negative scale
# flips the signs.
DIVISORS = np.concatenate([-np.arange(8, 12.5, 0.5), np.arange(7, 11.5, 0.5)])


@flax.struct.dataclass
class QuantizedKernel(nn.meta.AxisMetadata[jax.Array]):
    """Integer kernel or table with scales, dequantized when it is unboxed.

    Attributes:
        values: int8, of the kernel's shape; or uint8, with [G, P] for the contracted axes. The low
        four bits hold the first half of a group, the high ones the second, with 8 added to each.
        scale: float32, of the kernel's shape with 1 for contracted axes; or bfloat16, with
            [G, 1] for them.
        dtype: dtype of the kernel that the model sees.
        summed: in 4 bits, sizes of the contracted axes.
        n_last: number of axes after them.
    """

    values: jax.Array
    scale: jax.Array
    dtype: Any = flax.struct.field(pytree_node=False)
    summed: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    n_last: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        if self.values.dtype != jnp.uint8:
            return self.values.shape
        end = self.values.ndim - self.n_last
        return (*self.values.shape[: end - 2], *self.summed, *self.values.shape[end:])

    @classmethod
    def quantize(
        cls, kernel: jax.Array, info: ParamInfo, dtype: Any, bits: int = 8
    ) -> QuantizedKernel:
        """Round a kernel to integers; in 8 bits if an odd number of inputs cannot be packed in 4.

        Args:
            kernel: kernel, or embedding table, whose rows an output layer sums over.
            info: its role.
            dtype: dtype that the model will see.
            bits: 8 or 4.
        """
        first, end = summed_axes(kernel.ndim, info)
        summed = kernel.shape[first:end]
        size = group_size(prod(summed))
        if bits == 8 or not size:
            axes = tuple(range(first, end))
            scale = jnp.abs(kernel).max(axes, keepdims=True) / INT8_MAX
            values = jnp.round(kernel / jnp.maximum(scale, 1e-30)).astype(jnp.int8)
            return cls(values, scale, dtype)
        shape = (*kernel.shape[:first], -1, size, *kernel.shape[end:])
        groups = kernel.astype(jnp.float32).reshape(shape)
        values, scale = round_groups(groups, first + 1)
        low, high = jnp.split((values + 8).astype(jnp.uint8), 2, axis=first + 1)
        return cls(low | (high << 4), scale, dtype, summed, kernel.ndim - end)

    def unbox(self) -> jax.Array:
        """Return the dequantized kernel."""
        scale = self.scale.astype(self.dtype)
        if self.values.dtype != jnp.uint8:
            return self.values.astype(self.dtype) * scale
        halves = [half.astype(self.dtype) * scale for half in self.halves()]
        return jnp.concatenate(halves, self.values.ndim - self.n_last - 1).reshape(self.shape)

    def halves(self) -> tuple[jax.Array, jax.Array]:
        """Return the integers of the first and second half of each group of 4-bit numbers, int8."""
        low, high = self.values & 15, self.values >> 4
        return low.astype(jnp.int8) - 8, high.astype(jnp.int8) - 8

    def replace_boxed(self, val: Any) -> Any:
        """Return the value itself, which replaces the kernel."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> QuantizedKernel:
        """Return the same kernel for a stack: axes have no names."""
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> QuantizedKernel:
        """Return the same kernel for a layer."""
        return self


def summed_axes(ndim: int, info: ParamInfo) -> tuple[int, int]:
    """Return the range of axes that a product with a kernel contracts, as (first, end).

    Args:
        ndim: number of axes of the kernel, of one layer or stacked.
        info: its role. Tied output layers sum over embedding tables.
    """
    last = ndim - info.role.outputs
    if info.role.kind == Kind.EMBEDDING:
        return last, ndim
    return last - info.role.inputs, last


def group_size(n: int) -> int:
    """Return the 4-bit group size for n contracted elements; 0 if n is odd.

    It is even and divides n: the smallest such number from 32 on, or n.
    """
    if n % 2:
        return 0
    sizes = (size for size in range(SMALLEST_GROUP, n, 2) if n % size == 0)
    return next(sizes, n)


def round_params(
    params: Mapping[str, jax.Array], infos: Mapping[str, ParamInfo], weights: str
) -> dict[str, jax.Array]:
    """Round kernels and tables as `--config.decode.weights` stores them, in float32.

    Args:
        params: parameters by path; those without a role, as in frozen models, are unchanged.
        infos: role and axes of parameters by path.
        weights: int8, int4 or a dtype of floating point.
    """

    def rounded(path: str, x: jax.Array) -> jax.Array:
        if is_frozen(path) or path not in infos or infos[path].role.kind not in QUANTIZED:
            return x
        if weights not in BITS:
            return x.astype(weights).astype(jnp.float32)
        return QuantizedKernel.quantize(x, infos[path], jnp.float32, BITS[weights]).unbox()

    return {path: rounded(path, x) for path, x in params.items()}


def round_groups(groups: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Round groups to -8 … 7 times the scale with the least squared error.

    Values that were rounded this way before are unchanged.

    Args:
        groups: float32.
        axis: axis of the elements of a group.

    Returns:
        The integers, float32, and the scales, bfloat16.
    """
    index = jnp.expand_dims(jnp.abs(groups).argmax(axis), axis)
    largest = jnp.take_along_axis(groups, index, axis)

    def rounded(scale: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(groups / jnp.where(scale == 0, 1, scale)), -8, 7)

    def better(best: tuple, divisor: jax.Array) -> tuple[tuple, None]:
        scale = (largest / divisor).astype(jnp.bfloat16).astype(jnp.float32)
        error = jnp.square(rounded(scale) * scale - groups).sum(axis, keepdims=True)
        is_less = error < best[0]
        return (jnp.where(is_less, error, best[0]), jnp.where(is_less, scale, best[1])), None

    start = jnp.full_like(largest, jnp.inf), largest
    (_, scale), _ = jax.lax.scan(better, start, jnp.asarray(DIVISORS, jnp.float32))
    return rounded(scale), scale.astype(jnp.bfloat16)
