"""Residual streams other than the plain sum: parallel, concatenated, hyper-connections.

A stack widens its input to the stream, each block reads and writes it through a `Stream`, and the
stack narrows the result to [B, L, D], normalized. With `model.value_residual` the last elements of
the stream are the attention values of the first layer.

Shape letters: B batch, L length, D model, W width of the stream, C streams of hyper-connections,
U connections of a stream, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.models.attention import Attention, MixerInputs
from lm.models.layers import Linear, make_norm
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Kind, Part, Role, param
from lm.parallel.mesh import constrain


def widen(config: TransformerConfig, x_BLD: jax.Array) -> jax.Array:
    """Return the stream [B, L, W] that enters the first block."""
    c = config
    x_BLW = jnp.tile(x_BLD, c.hyper_streams) if c.residual == "hyper" else x_BLD
    n_values = _n_values(c)
    return jnp.pad(x_BLW, [(0, 0), (0, 0), (0, n_values)]) if n_values else x_BLW


def narrow(config: TransformerConfig, x_BLW: jax.Array) -> jax.Array:
    """Return the output [B, L, D] of a stack; call it in the stack's compact method."""
    c = config
    x_BLW = x_BLW[..., : x_BLW.shape[-1] - _n_values(c)]
    if c.residual == "hyper":
        x_BLW = x_BLW.reshape(*x_BLW.shape[:2], c.hyper_streams, -1).sum(2)
    x_BLW = make_norm(c, "final_norm")(x_BLW)
    return project(c, x_BLW, c.d_model, "output", "body") if c.residual == "concat" else x_BLW


def _n_values(config: TransformerConfig) -> int:
    """Return the width of the first layer's values in the stream."""
    return config.n_kv_heads * config.head_dim if config.value_residual != "none" else 0


def project(
    config: TransformerConfig, x_BLW: jax.Array, n_out: int, name: str, part: Part = "layers"
) -> jax.Array:
    """Apply a linear map without bias to a stream, or to several that are concatenated.

    Args:
        config: configuration of the stack.
        x_BLW: input of any width.
        n_out: width of the output.
        name: module name.
        part: part of the model that the kernel belongs to.
    """
    c, width = config, x_BLW.shape[-1]
    init, axes = c.kernel_init(c.std(width, n_out)), ("embed", "residual")
    role = Role(Kind.MATRIX, c.stream, part)
    return Linear((width,), (n_out,), axes, role, False, init, c.dtype, name=name)(x_BLW)


class Stream:
    """Residual stream of one block: the plain sum; subclasses have other rules.

    Its parameters belong to the block, whose compact method calls it.
    """

    def __init__(self, block: nn.Module, x_BLW: jax.Array, number: jax.Array | None):
        """Wrap the stream that enters a block.

        Args:
            block: the block.
            x_BLW: the stream.
            number: number of the block in its stack, from 0.
        """
        assert number is not None
        self.block, self.number = block, number
        self.config: TransformerConfig = block.config  # type: ignore[attr-defined]
        width = x_BLW.shape[-1] - _n_values(self.config)
        self.x_BLW, self.values_BLV = jnp.split(x_BLW, [width], axis=-1)

    def through(
        self, names: tuple[str, ...], run: Callable[[str, jax.Array], jax.Array]
    ) -> jax.Array:
        """Run the sublayers; return the stream that leaves the block.

        Args:
            names: names of the sublayers, in order.
            run: runs the sublayer of a name on an input, with its norms and dropout.
        """
        for i, name in enumerate(names):
            x_BLW = self.read(name, self.number * len(names) + i)
            self.write(name, run(name, x_BLW))
        return jnp.concatenate([self.x_BLW, self.values_BLV], axis=-1)

    def read(self, name: str, index: jax.Array) -> jax.Array:
        """Return the input of a sublayer, given its name and its index in the stack."""
        return self.x_BLW

    def write(self, name: str, y_BLD: jax.Array) -> None:
        """Add the output of the sublayer `name`."""
        self.x_BLW = _constrained(self.x_BLW + y_BLD)

    def mix_values(self, mixer: Attention, x_BLW: jax.Array, inputs: MixerInputs) -> MixerInputs:
        """Return the inputs of self-attention, with the first layer's values mixed in.

        V'_n = λ_1 V_1 + λ_2 V_n for n > 1; both λ are ½, or are learned per layer, starting at ½
        (ResFormer; Zhou et al. 2024, arXiv 2410.17897, §3.2).

        Args:
            mixer: attention of the block.
            x_BLW: its input.
            inputs: its other inputs.
        """
        c = self.config
        if c.value_residual == "none":
            return inputs
        v_BSGK, is_first = mixer.values(x_BLW), self.number == 0
        first_BSGK = jnp.where(is_first, v_BSGK, self.values_BLV.reshape(v_BSGK.shape))
        self.values_BLV = first_BSGK.reshape(self.values_BLV.shape)
        weights = jnp.full(2, 0.5)
        if c.value_residual == "learned":
            half, role = nn.initializers.constant(0.5), Role(Kind.NORM, c.stream)
            weights = param(self.block, "value_weights", half, (2,), ("norm",), role)
        a, b = weights.astype(v_BSGK.dtype)
        mixed_BSGK = jnp.where(is_first, v_BSGK, a * first_BSGK + b * v_BSGK)
        return replace(inputs, values_BSGK=mixed_BSGK)


class ParallelStream(Stream):
    """Parallel sublayers that read the same norm: x + attention(norm(x)) + mlp(norm(x)).

    GPT-J (Wang and Komatsuzaki 2021) and PaLM (Chowdhery et al. 2022, §2).
    """

    input_BLD: jax.Array | None = None

    def read(self, name: str, index: jax.Array) -> jax.Array:
        """Return the normalized stream that entered the block."""
        if self.input_BLD is None:
            self.input_BLD = make_norm(self.config, "attention_norm")(self.x_BLW)
        return self.input_BLD


class ConcatStream(Stream):
    """Stream of `residual="concat"`, which widens by g = `concat_width` per block.

    Block l, counted from 0, reads H^l [B, L, D + l g]; its first sublayer reads H^l and each later
    one concat(H^l, u), where u is the sum of earlier sublayer outputs; h^l [B, L, D] is the sum of
    all. The block returns H^{l+1} = concat(H^l, h^l W^{l+1}) with W^{l+1} [D, g]; H^0 are the
    embeddings. The stack ends with a projection of H^N, normalized, to [B, L, D], so that output
    layers are those of other stacks, tied embeddings included.
    """

    sum_BLD: jax.Array | None = None
    input_BLW: jax.Array | None = None

    def write(self, name: str, y_BLD: jax.Array) -> None:
        """Concatenate the sum of the outputs, or its projection, to the input."""
        if self.input_BLW is None or self.sum_BLD is None:
            self.input_BLW, self.sum_BLD = self.x_BLW, y_BLD
        else:
            self.sum_BLD = self.sum_BLD + y_BLD
        y_BLD = self.sum_BLD
        if name == "feed_forward":
            y_BLD = project(self.config, y_BLD, self.config.concat_width, "concat")
        self.x_BLW = _constrained(jnp.concatenate([self.input_BLW, y_BLD], axis=-1))


class HyperStream(Stream):
    """Hyper-connections of C residual streams (Zhu et al. 2024, arXiv 2409.19606, §2).

    A sublayer T reads A_m^T H, and its output is added to the mixed streams (eq. 2 to 5):
    H' = A_r^T H + B^T T(A_m^T H). All streams start as the embeddings; the stack returns their sum.
    """

    def read(self, name: str, index: jax.Array) -> jax.Array:
        """Return A_m^T H; keep A_r^T H and B for `write`."""
        C, x_BLW = self.config.hyper_streams, self.x_BLW
        H_BLCD = x_BLW.reshape(*x_BLW.shape[:2], C, -1)
        connection = HyperConnection(self.config, name=f"{name}_connection")
        weights_BLCU = connection(H_BLCD, index)
        mixed_BLUD = jnp.einsum(
            "BLCU,BLCD->BLUD",
            weights_BLCU[..., :-1].astype(H_BLCD.dtype),
            H_BLCD,
            preferred_element_type=jnp.float32,
        ).astype(H_BLCD.dtype)
        self.kept_BLCD, self.added_BLC = mixed_BLUD[:, :, 1:], weights_BLCU[..., -1]
        return mixed_BLUD[:, :, 0]

    def write(self, name: str, y_BLD: jax.Array) -> None:
        """Set H to A_r^T H + B^T y."""
        added_BLC = self.added_BLC[..., None].astype(y_BLD.dtype)
        H_BLCD = self.kept_BLCD + added_BLC * y_BLD[:, :, None]
        self.x_BLW = _constrained(H_BLCD.reshape(self.x_BLW.shape))


class HyperConnection(nn.Module):
    """Weights [A_m, A_r, B^T] that connect the streams to a sublayer.

    Initially they are a plain residual sum in which sublayer k reads stream k mod C (eq. 14). A
    learned static part is added, and with `hyper_dynamic` s tanh(norm(H) W), where W starts at 0
    and s at 0.01 (eq. 10 to 13).
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, H_BLCD: jax.Array, index: jax.Array) -> jax.Array:
        """Return the weights [B or 1, L or 1, C, U], U = C + 2, float32.

        Args:
            H_BLCD: the streams.
            index: number k of the sublayer in its stack.
        """
        c, C = self.config, self.config.hyper_streams
        zeros, axes = nn.initializers.zeros, ("norm", "norm")
        learned_CU = param(
            self, "static", zeros, (C, C + 2), axes, Role(Kind.BIAS, c.stream, outputs=2)
        )
        is_read_C1 = (jnp.arange(C) == index % C)[:, None]
        start_CU = jnp.concatenate([is_read_C1, jnp.eye(C), jnp.ones((C, 1))], axis=1)
        weights_BLCU = (start_CU + learned_CU)[None, None]
        if c.hyper_dynamic:
            role, names = Role(Kind.ROUTER, c.stream), ("router_inputs", "router")
            project_H = Linear(
                (c.d_model,), (C + 2,), names, role, False, zeros, c.dtype, name="dynamic"
            )
            small, scale_role = nn.initializers.constant(0.01), Role(Kind.NORM, c.stream)
            a, b = param(self, "scale", small, (2,), ("norm",), scale_role)
            changes = jnp.tanh(project_H(make_norm(c, "norm")(H_BLCD)).astype(jnp.float32))
            scale_U = jnp.where(jnp.arange(C + 2) <= C, a, b)
            weights_BLCU = weights_BLCU + scale_U * changes
        return weights_BLCU


def _constrained(x_BLW: jax.Array) -> jax.Array:
    return constrain(x_BLW, "batch", "residual_length", "embed")


STREAMS = {
    "sum": Stream,
    "parallel": ParallelStream,
    "concat": ConcatStream,
    "hyper": HyperStream,
}
