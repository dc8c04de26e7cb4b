"""Kernels of linear maps in 8 bits, which a model sees as it reads them, layer by layer."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lm.models.cached_attention import INT8_MAX
from lm.models.variables import ParamInfo


@flax.struct.dataclass
class Int8Kernel(nn.meta.AxisMetadata[jax.Array]):
    """Kernel of int8 values, with a float32 scale for every output, unboxed where it is read.

    Attributes:
        values: int8, of the kernel's shape.
        scale: the same shape, with 1 for every axis that is summed over.
        dtype: dtype of the kernel that the model sees.
    """

    values: jax.Array
    scale: jax.Array
    dtype: Any = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return self.values.shape

    @classmethod
    def quantize(cls, kernel: jax.Array, info: ParamInfo, dtype: Any) -> Int8Kernel:
        """Round a kernel of a role to multiples of max |w| / 127 of each output."""
        last = kernel.ndim - info.role.outputs
        summed = tuple(range(last - info.role.inputs, last))
        scale = jnp.abs(kernel).max(summed, keepdims=True) / INT8_MAX
        values = jnp.round(kernel / jnp.maximum(scale, 1e-30)).astype(jnp.int8)
        return cls(values, scale, dtype)

    def unbox(self) -> jax.Array:
        """Return the kernel."""
        return self.values.astype(self.dtype) * self.scale.astype(self.dtype)

    def replace_boxed(self, val: Any) -> Any:
        """Return a value in place of the kernel."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> Int8Kernel:
        """Return the kernel of a layer as that of a stack: axes have no names."""
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Int8Kernel:
        """Return the kernel of a stack as that of a layer."""
        return self
