"""Layers with parameters: linear maps, normalization, embeddings, feed-forward layers.

Shape letters: B batch, L query length, D model, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.dense import matmul
from lm.kernels.elementwise import ACTIVATIONS, GATED, add_bias
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Initializer, Kind, Part, Role, param
from lm.parallel.mesh import constrain, current_mesh


def multiply(
    x: jax.Array, kernel: jax.Array, names: tuple[str, str], dtypes: tuple, transposed: bool
) -> jax.Array:
    """Multiply the last dimension of x by a kernel.

    Args:
        x: [..., D].
        kernel: [D, F], or [F, D] if `transposed`.
        names: logical axes D and F.
        dtypes: compute dtype, and the dtype in which the product is used.
        transposed: whether the kernel is stored as [F, D].

    Returns:
        The product [T, F] with leading dimensions flattened into one, which the backward pass
        multiplies fastest; or [B, L, F] on meshes that shard the length.
    """
    mesh = current_mesh()
    if mesh is None or (mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"):
        return matmul(x.reshape(-1, x.shape[-1]), kernel, dtypes[0], transposed)
    from lm.models.sharded_linear import product_on_mesh

    return product_on_mesh(x, kernel, names, dtypes, transposed)


class Linear(nn.Module):
    """Linear map of the last `len(in_shape)` dimensions to `out_shape`.

    The kernel is [*in_shape, *out_shape], with the logical axes `names`. It is applied as one
    matrix product, accumulated in float32. `role` is the kernel's role; its numbers of axes are
    derived from the shapes.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    names: tuple[str, ...]
    role: Role
    use_bias: bool
    kernel_init: Initializer
    dtype: jnp.dtype
    out_dtype: jnp.dtype | None = None
    bias_init: Initializer = nn.initializers.zeros

    def setup(self) -> None:
        shape = (*self.in_shape, *self.out_shape)
        role = replace(self.role, inputs=len(self.in_shape), outputs=len(self.out_shape))
        self.kernel = param(self, "kernel", self.kernel_init, shape, self.names, role)
        if self.use_bias:
            axes = self.names[len(self.in_shape) :]
            self.bias = param(self, "bias", self.bias_init, self.out_shape, axes, role.bias())

    def __call__(self, x: jax.Array) -> jax.Array:
        width, n_leading = prod(self.in_shape), x.ndim - len(self.in_shape)
        leading, kernel = x.shape[:n_leading], self.kernel.reshape(width, prod(self.out_shape))
        y = self.product(x.reshape(*leading, width), kernel)
        if self.use_bias:
            y = add_bias(y.astype(jnp.float32), self.bias.reshape(-1))
        return y.astype(self.out_dtype or self.dtype).reshape(*leading, *self.out_shape[:-1], -1)

    def product(self, x: jax.Array, kernel_DF: jax.Array) -> jax.Array:
        """Return the product, flattened or not; `low_precision.py` replaces this method."""
        names = self.names[0], self.names[len(self.in_shape)]
        return multiply(x, kernel_DF, names, (self.dtype, self.out_dtype or self.dtype), False)


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019), computed in float32.

    With `unit_offset` it multiplies by 1 + scale, so that decay pulls towards 1 (Gemma).
    """

    kind: str
    role: Role
    eps: float
    use_bias: bool
    unit_offset: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        width = x_BLD.shape[-1:]
        start = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        scale_D = param(self, "scale", start, width, ("norm",), self.role)
        x_BLD = x_BLD.astype(jnp.float32)
        if self.kind == "layernorm":
            x_BLD -= x_BLD.mean(-1, keepdims=True)
        y_BLD = x_BLD * jax.lax.rsqrt(jnp.square(x_BLD).mean(-1, keepdims=True) + self.eps)
        y_BLD *= 1 + scale_D if self.unit_offset else scale_D
        if self.kind == "layernorm" and self.use_bias:
            zeros = nn.initializers.zeros
            y_BLD += param(self, "bias", zeros, width, ("norm",), self.role.bias())
        return y_BLD.astype(self.dtype)


def make_norm(config: TransformerConfig, name: str | None = None, part: Part = "layers") -> Norm:
    """Build the model's standard normalization layer."""
    c = config
    role = Role(Kind.NORM, c.stream, part)
    return Norm(c.norm, role, c.norm_eps, c.norm_bias, c.norm_unit_offset, c.dtype, name=name)


class Embedding(nn.Module):
    """Embedding table, looked up by id; `attend` is the tied output projection."""

    rows: int
    width: int
    row_name: str
    role: Role
    table_init: Initializer
    dtype: jnp.dtype

    def setup(self) -> None:
        axes, role = (self.row_name, "embed"), replace(self.role, inputs=1)
        shape = (self.rows, self.width)
        self.embedding = param(self, "embedding", self.table_init, shape, axes, role)

    def __call__(self, ids_BL: jax.Array) -> jax.Array:
        table_VD, mesh = self.embedding.astype(self.dtype), current_mesh()
        if mesh is None or mesh.size == 1:
            return jnp.take(table_VD, ids_BL, axis=0)
        from lm.parallel.sharded_lookup import embedding_lookup

        return embedding_lookup(table_VD, (self.row_name, "embed"), ids_BL)

    def first(self, length: int) -> jax.Array:
        """Return rows 0 … length - 1 as a slice, so that the gradient needs no scatter."""
        return self.embedding[:length].astype(self.dtype)

    def attend(self, x_BLD: jax.Array) -> jax.Array:
        """Return logits [B, L, rows], float32."""
        names, dtypes = ("embed", self.row_name), (self.dtype, jnp.float32)
        return multiply(x_BLD, self.embedding, names, dtypes, True).reshape(*x_BLD.shape[:-1], -1)


class FeedForward(nn.Module):
    """Feed-forward layer act(x W_in) W_out, or gated: (act(x W_gate) * x W_in) W_out.

    Gated layers are those of Shazeer 2020 (arXiv 2002.05202).
    """

    config: TransformerConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        c, width = self.config, x_BLD.shape[-1]
        role = Role(Kind.MATRIX, c.stream)

        def wide(name: str) -> jax.Array:
            init, names = c.kernel_init(c.std(width, c.d_ff)), ("embed", "mlp")
            linear = Linear((width,), (c.d_ff,), names, role, c.bias, init, c.dtype, name=name)
            return constrain(linear(x_BLD), "batch", "length", "mlp")

        act, gated = ACTIVATIONS[c.activation], GATED.get(c.activation)
        h_BLF = act(wide("gate")) * gated(wide("in")) if gated else act(wide("in"))
        h_BLF = nn.Dropout(c.activation_dropout, deterministic=self.deterministic)(h_BLF)
        init, names = c.kernel_init(c.residual_std(c.d_ff, c.d_model)), ("mlp", "embed")
        out = Linear((c.d_ff,), (c.d_model,), names, role, c.bias, init, c.dtype, name="out")
        return out(h_BLF)
