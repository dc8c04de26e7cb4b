"""Token mixers: multi-head attention with grouped heads and RoPE, and the interface of others.

Shape letters: B batch, L query length, S key length, D model, W width of the input, H heads,
G key/value heads, K head dim, N layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lm.config.registries import TRANSFORMERS
from lm.config.rules import tiled_attention_problem
from lm.errors import UserError
from lm.kernels.dot_product_attention import AttentionMask, Dropout, attention
from lm.kernels.tiled_attention import tiled_attention
from lm.models.cache import Layer
from lm.models.cached_attention import attend_and_cache, empty_keys_values
from lm.models.layers import Linear
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Kind, Role, Stream, param
from lm.parallel.mesh import constrain, count_shards, current_mesh

KeyValue = tuple[jax.Array, jax.Array]  # [B, S, G, K] each; of several layers [N, B, S, G, K]


@flax.struct.dataclass
class Rotation:
    """RoPE of one layer, or of all layers if they are alike; `rotary.py` has further kinds.

    Attributes:
        angles_BLR: angles [B, L, R/2], where R is the width of the rotated part of a head.
    """

    angles_BLR: jax.Array

    def of_layer(self, is_global: jax.Array | None, is_nope: jax.Array | None) -> Rotation:
        """Return the RoPE of a layer; for arguments see `LayerInputs`."""
        return self

    def queries(self, q_BLHK: jax.Array) -> jax.Array:
        """Return rotated queries."""
        return rotate(q_BLHK, self.angles_BLR)

    def keys(self, k_BSGK: jax.Array) -> jax.Array:
        """Return rotated keys."""
        return rotate(k_BSGK, self.angles_BLR)


@flax.struct.dataclass
class MixerInputs:
    """Inputs of a token mixer besides the tokens.

    Attributes:
        mask: visible keys. `segments_BL` are the segment ids of the tokens, 0 for padding; `offset`
            is the cache slot of the first; the mask includes the layer's window.
        rotation: RoPE of the layer, or None.
        bias_HLS: position bias of the scores; for the kernel "flash" by distance (`position_bias`).
        sinks_H: logits of the attention sinks of each head.
        values_BSGK: attention values to use instead of the projected tokens, or None.
    """

    mask: AttentionMask
    rotation: Rotation | None = None
    bias_HLS: jax.Array | None = None
    sinks_H: jax.Array | None = None
    values_BSGK: jax.Array | None = None


class TokenMixer(nn.Module):
    """Interface of the sublayer that moves information between tokens; it defines its own cache.

    The registry `MIXERS` (`lm/config/registries.py`) lists them by name; `LayerType.mixer` selects
    one for each layer. Cached decoding, of any number of tokens at a time, must give the same
    results as the full sequence.

    Attributes:
        config: configuration of the stack; `config.mixer_options` are the options registered with
            the mixer.
        deterministic: True turns dropout off.
        width: width W of the input; the output is `config.d_model` wide.
    """

    config: TransformerConfig
    deterministic: bool
    width: int

    @classmethod
    def head_widths(cls, model: Any) -> tuple[int, int]:
        """Return the widths of a head's queries and values in a product over all token pairs.

        Args:
            model: resolved section "model" of the configuration.
        """
        return 0, 0

    @classmethod
    def init_cache(cls, config: TransformerConfig, n_layers: int, batch: int, length: int) -> Any:
        """Return an empty cache: any pytree of arrays [n_layers, batch, …].

        A longer cache has the same layout, so that a shorter one is a prefix of it.
        """
        raise NotImplementedError

    def __call__(
        self, x_BLW: jax.Array, inputs: MixerInputs, cache: Any, layer: Layer | None
    ) -> tuple[jax.Array, Any]:
        """Mix tokens.

        Args:
            x_BLW: normalized tokens.
            inputs: mask, RoPE and position bias.
            cache: cache of all layers with this mixer, when decoding; `lm.models.cache.write_layer`
                writes the entries of one layer without a copy of the others.
            layer: index of this layer in the cache; (), which selects the whole array, if the cache
                holds only this layer.

        Returns:
            Output [B, L, D], and the cache with these tokens.
        """
        raise NotImplementedError


class DotProductAttention(nn.Module):
    """Projections of multi-head attention (Vaswani et al. 2017, §3.2), and attention with them.

    Attributes:
        config: configuration of the stack.
        deterministic: True turns dropout off.
        width: width of the input of queries.
        source_width: width of the input of keys and values; 0: `width`.
        source_stream: token stream of keys and values; None: that of the queries.
    """

    config: TransformerConfig
    deterministic: bool
    width: int
    source_width: int = 0
    source_stream: Stream | None = None

    def setup(self) -> None:
        c = self.config
        source_width = self.source_width or self.width
        # If scores are not divided by sqrt(K), fan-in initialization of queries includes it (T5).
        unscaled = c.init == "fan_in" and c.attention_scale == 1
        query_std = c.std(self.width, c.n_heads * c.head_dim) * (
            c.base_head_dim**-0.5 if unscaled else 1.0
        )
        key_std = c.std(source_width, c.n_kv_heads * c.head_dim)

        role = Role(Kind.MATRIX, c.stream)
        source_role = replace(role, stream=self.source_stream or c.stream)

        def heads(name: str, width: int, n: int, axis: str, std: float, role: Role) -> Linear:
            init, names = c.kernel_init(std), ("embed", axis, "head_dim")
            bias = name in c.attention_biases
            return Linear((width,), (n, c.head_dim), names, role, bias, init, c.dtype)

        of_source = source_width, c.n_kv_heads, "kv_heads", key_std, source_role
        of_tokens = self.width, c.n_heads, "heads", query_std, role
        self.query, self.output_gate = heads("query", *of_tokens), heads("output_gate", *of_tokens)
        self.key = heads("key", *of_source)
        self.value = heads("value", *of_source)
        self.out = Linear(
            (c.n_heads, c.head_dim),
            (c.d_model,),
            ("heads", "head_dim", "embed"),
            role,
            "out" in c.attention_biases,
            c.kernel_init(c.residual_std(c.n_heads * c.head_dim, c.d_model)),
            c.dtype,
        )
        if c.qk_norm:
            from lm.models.head_norm import make_head_norm

            self.query_norm, self.key_norm = make_head_norm(c), make_head_norm(c)

    def queries(self, x_BLW: jax.Array) -> jax.Array:
        """Return queries [B, L, H, K], normalized if `qk_norm` is set (Henry et al. 2020)."""
        q_BLHK = self.query(x_BLW)
        if self.config.qk_norm:
            q_BLHK = self.query_norm(q_BLHK)
        q_BLHK *= jnp.asarray(self.config.query_multiplier, q_BLHK.dtype)
        return constrain(q_BLHK, "batch", "length", "heads", "head_dim")

    def keys_values(self, source_BSW: jax.Array, v_BSGK: jax.Array | None = None) -> KeyValue:
        """Return keys and values, [B, S, G, K] each; values may be given."""
        k_BSGK = self.key(source_BSW)
        if self.config.qk_norm:
            k_BSGK = self.key_norm(k_BSGK)
        k_BSGK = constrain(k_BSGK, "batch", "length", "kv_heads", "head_dim")
        return k_BSGK, self.values(source_BSW) if v_BSGK is None else v_BSGK

    def values(self, source_BSW: jax.Array) -> jax.Array:
        """Return values, [B, S, G, K]."""
        return constrain(self.value(source_BSW), "batch", "length", "kv_heads", "head_dim")

    def _attend(
        self,
        q_BLHK: jax.Array,
        keys_values: KeyValue,
        mask: AttentionMask,
        bias_HLS: jax.Array | None = None,
        sinks_H: jax.Array | None = None,
    ) -> jax.Array:
        """Return the outputs of the heads, [B, L, H, K]."""
        c = self.config
        dropout = None
        if c.attention_dropout and not self.deterministic:
            dropout = Dropout(self.make_rng("dropout"), c.attention_dropout)
        return attend(
            q_BLHK,
            *keys_values,
            mask,
            kernel=c.attention,
            context_attention=c.context_attention,
            scale=c.score_scale,
            softcap=c.attention_softcap,
            bias_HLS=bias_HLS,
            sinks_H=sinks_H,
            dropout=dropout,
        )


class Attention(DotProductAttention, TokenMixer):
    """Self-attention; its cache holds keys and values of all tokens so far.

    With `attention_sinks` each head has a learned logit that is part of the softmax but has no
    value (gpt-oss, OpenAI 2025, §2.2). With `attention_gate` sigmoids of the token multiply the
    outputs of the heads (Qiu et al. 2025, arXiv 2505.06708).
    """

    def setup(self) -> None:
        super().setup()
        c = self.config
        if c.attention_sinks:
            role = Role(Kind.BIAS, c.stream)
            self.sinks = param(self, "sinks", c.bias_init(), (c.n_heads,), ("heads",), role)

    @classmethod
    def head_widths(cls, model: Any) -> tuple[int, int]:
        """Return the head dimension twice."""
        return model.head_dim, model.head_dim

    @classmethod
    def init_cache(cls, config: TransformerConfig, n_layers: int, batch: int, length: int) -> Any:
        """Return empty keys and values, [N, B, G, S, K] each."""
        return empty_keys_values(config, n_layers, batch, length)

    def __call__(
        self, x_BLW: jax.Array, inputs: MixerInputs, cache: Any, layer: Layer | None
    ) -> tuple[jax.Array, Any]:
        """Attend to the tokens themselves and those in the cache."""
        q_BLHK = self.queries(x_BLW)
        keys_values = k_BSGK, v_BSGK = self.keys_values(x_BLW, inputs.values_BSGK)
        if inputs.rotation is not None:
            q_BLHK = inputs.rotation.queries(q_BLHK)
            keys_values = inputs.rotation.keys(k_BSGK), v_BSGK
        if self.config.attention_sinks:
            inputs = replace(inputs, sinks_H=self.sinks)
        if cache is None:
            o_BLHK = self._attend(q_BLHK, keys_values, inputs.mask, inputs.bias_HLS, inputs.sinks_H)
        else:
            o_BLHK, cache = attend_and_cache(self.config, q_BLHK, keys_values, inputs, cache, layer)
        if self.config.attention_gate:
            o_BLHK *= jax.nn.sigmoid(self.output_gate(x_BLW))
        return self.out(o_BLHK), cache


def attend(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: AttentionMask,
    *,
    kernel: str,
    context_attention: str,
    **options: Any,
) -> jax.Array:
    """Compute attention with the kernel that `choose_attention` chose.

    The compiler partitions "xla" and "tiled" over rows and heads. Off a mesh, as in decoding,
    "xla" replaces the kernels that need one.

    Args:
        q_BLHK: queries.
        k_BSGK: keys.
        v_BSGK: values.
        mask: visible keys.
        kernel: name of the kernel.
        context_attention: "ring" or "gather" if the length is sharded; keys of another
            sequence are always gathered.
        **options: `scale`, `softcap`, `bias_HLS`, `sinks_H` and `dropout`, as for the kernel "xla".

    Returns:
        [B, L, H, K].

    Raises:
        ValueError: the kernel does not support the options.
    """
    by_compiler = kernel in ("xla", "tiled") and count_shards("length") == 1
    if by_compiler or current_mesh() is None:
        run = tiled_attention if kernel == "tiled" else attention
        return run(q_BLHK, k_BSGK, v_BSGK, mask, **options)
    from lm.models.sharded_attention import attend_on_mesh

    options |= {"kernel": kernel, "context_attention": context_attention}
    return attend_on_mesh(q_BLHK, k_BSGK, v_BSGK, mask, **options)


# --- choice of the kernel

# In order of preference.
FUSED_ON = {"cpu": ("tiled",), "tpu": ("splash", "flash"), "gpu": ("cudnn", "tokamax", "triton")}
# Platform by the name that a device description for ahead-of-time compilation has.
CALLED = {"cuda": "gpu", "rocm": "gpu"}
PLATFORM_OF = {"splash": "tpu", "flash": "tpu", "cudnn": "gpu", "tokamax": "gpu", "triton": "gpu"}


@dataclass(frozen=True)
class AttentionChoice:
    """Attention kernel, and how it gets the keys of other parts of the sequence.

    Attributes:
        kernel: name of the kernel.
        across: "ring" or "gather" under context parallelism, else "".
        why: reason, shown to the user.
    """

    kernel: str
    across: str
    why: str


def choose_attention(
    config: ConfigDict, platform: str, sizes: Mapping[str, int], capability: str = ""
) -> AttentionChoice:
    """Choose the attention kernel.

    "auto" takes the first of the platform's kernels that can run, else "xla"; and ring
    attention if the kernel supports it.

    Args:
        config: valid configuration with its defaults filled in.
        platform: "cpu", "tpu" or "gpu".
        sizes: sizes of all mesh axes.
        capability: compute capability of a GPU; "": unknown.

    Raises:
        UserError: no kernel that the configuration allows can run.
    """
    platform = CALLED.get(platform, platform)
    named, across = config.model.attention, config.parallel.context_attention
    kernels = (*FUSED_ON[platform], "xla") if named == "auto" else (named,)
    ways = ("ring", "gather") if across == "auto" else (across,)
    ways = ways if (context := sizes["context"]) > 1 else ("",)
    problems: list[str] = []
    for kernel in kernels:
        for way in ways:
            problem = next(_problems(kernel, way, config, platform, context, capability), "")
            if not problem:
                best = kernel == kernels[0]
                why = f"the one for {platform}" if best else "; ".join(problems)
                return AttentionChoice(kernel, way, why if named == "auto" else "as configured")
            problems.append(f"{kernel} cannot be used with {problem}")
    found = "; ".join(dict.fromkeys(problems))
    raise UserError(f"--config.model.attention={found}: use auto, or change that")


def _problems(
    kernel: str, across: str, config: ConfigDict, platform: str, context: int, capability: str
) -> Iterator[str]:
    """Yield the settings that prevent a kernel from running, to follow "cannot be used with"."""
    model = config.model
    if model.family not in TRANSFORMERS:
        if kernel != "xla":
            yield f"--config.model.family={model.family}"
        return
    if PLATFORM_OF.get(kernel, platform) != platform:
        yield f"{platform} devices"
    if context > 1 and kernel == "tiled":
        yield f"--config.parallel.mesh.context={context}"
    if kernel == "tiled" and (problem := tiled_attention_problem(config)):
        yield problem
    if kernel not in ("xla", "tiled") or across == "ring":
        from lm.models.sharded_attention import kernel_problems

        yield from kernel_problems(kernel, across == "ring", config, context, capability)


# --- rotary position embeddings


def rotate(x_BLHK: jax.Array, angles_BLR: jax.Array) -> jax.Array:
    """Rotate the pairs (k, k + R/2) of every head by the angles (Llama's layout).

    Args:
        x_BLHK: queries or keys.
        angles_BLR: angles [B, L, R/2]; dimensions beyond R are not rotated.
    """
    cos_BL1R, sin_BL1R = jnp.cos(angles_BLR)[:, :, None], jnp.sin(angles_BLR)[:, :, None]
    R = angles_BLR.shape[-1]
    a_BLHR, b_BLHR, rest_BLHK = jnp.split(x_BLHK.astype(jnp.float32), [R, 2 * R], axis=-1)
    turned = a_BLHR * cos_BL1R - b_BLHR * sin_BL1R, a_BLHR * sin_BL1R + b_BLHR * cos_BL1R
    return jnp.concatenate([*turned, rest_BLHK], axis=-1).astype(x_BLHK.dtype)


def rotary_angles(
    positions_BL: jax.Array,
    width: int,
    theta: float,
    scale: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Return the RoPE angles [B, L, R/2] of each position (Su et al. 2021, eq. 15).

    Args:
        positions_BL: positions.
        width: R.
        theta: base of the wavelengths.
        scale: maps the frequencies [R/2] to those for a longer context, [R/2] or [B, L, R/2].
    """
    frequencies = theta ** (-jnp.arange(0, width, 2) / width)
    return positions_BL[..., None] * (scale(frequencies) if scale else frequencies)


def rotations(
    config: TransformerConfig, positions_BL: jax.Array, segments_BL: jax.Array | None
) -> Rotation:
    """Return the RoPE of all layers.

    Args:
        config: configuration of the stack.
        positions_BL: positions of the tokens.
        segments_BL: segment ids of the tokens; None: one text per row.
    """
    c = config
    differs = c.rope_scaling != "none" or c.rope_fraction != 1
    if c.window or c.nope_every or c.nope_layers or c.rope_norm or differs:
        from lm.models.rotary import further_rotations

        return further_rotations(c, positions_BL, segments_BL)
    return Rotation(rotary_angles(positions_BL, c.head_dim, c.rope_theta))
