"""Multi-head latent attention (DeepSeek-V2, DeepSeek-AI 2024, arXiv 2405.04434, §2.1).

Keys and values of all heads are computed from one latent vector per token; all heads share the
part of the key that RoPE rotates. The cache holds only the latent and this part.

Shape letters: B batch, L query length, S key length, D model, W width of the input, H heads, R rank
of the latent, K rotated part of a head (`head_dim`), N its other part, V values of a head, M the
wider of N + K and V, C = R + K elements per token in the cache.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import AttentionMask, Dropout
from lm.models.attention import MixerInputs, TokenMixer, attend
from lm.models.cache import Layer, heads_first
from lm.models.cached_attention import attend_and_cache
from lm.models.layers import Linear, Norm
from lm.models.rotary import score_factor
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Kind, Role
from lm.parallel.mesh import constrain, count_shards

LATENT_EPS = 1e-6  # epsilon of the latent norms in all released models
Pair = tuple[jax.Array, jax.Array]
UNEQUAL = ("xla", "splash")  # kernels whose queries and values may have different widths


class LatentAttention(TokenMixer):
    """Multi-head attention with keys and values computed from latents.

    Training expands the latents to keys [N + K] and values [V] of every head. Decoding does not: it
    absorbs the key up-projection into the queries and applies the value up-projection to the output
    (ibid., §2.1.2), which makes it attention of H query heads to one key head of width C.
    """

    @classmethod
    def head_widths(cls, model: Any) -> tuple[int, int]:
        """Return N + K and V."""
        return model.qk_nope_head_dim + model.head_dim, model.v_head_dim

    @classmethod
    def init_cache(cls, config: TransformerConfig, n_layers: int, batch: int, length: int) -> Any:
        """Return empty latents and rotated keys, [layers, B, 1, S, C]."""
        width = config.mixer_options.kv_lora_rank + config.head_dim
        return heads_first(config, (jnp.zeros((n_layers, batch, length, 1, width), config.dtype),))

    def setup(self) -> None:
        c, o = self.config, self.config.mixer_options
        heads = ("heads", "head_dim")
        key_width, value_width = o.qk_nope_head_dim + c.head_dim, o.v_head_dim

        def linear(n_in: int, shape: tuple[int, ...], *names: str, bias: bool = False) -> Linear:
            init, role = c.kernel_init(c.std(n_in, prod(shape))), Role(Kind.MATRIX, c.stream)
            return Linear((n_in,), shape, names, role, bias, init, c.dtype)

        def down(width: int) -> Linear:
            return linear(
                self.width, (width,), "embed", "head_dim", bias="query" in c.attention_biases
            )

        def norm() -> Norm:
            role = Role(Kind.NORM, c.stream)
            return Norm("rmsnorm", role, LATENT_EPS, False, c.norm_unit_offset, c.dtype)

        if o.q_lora_rank:
            self.query_down, self.query_norm = down(o.q_lora_rank), norm()
            self.query = linear(o.q_lora_rank, (c.n_heads, key_width), "latent", *heads)
        else:
            self.query = linear(self.width, (c.n_heads, key_width), "embed", *heads)
        self.down, self.norm = down(o.kv_lora_rank + c.head_dim), norm()
        self.up = linear(
            o.kv_lora_rank, (c.n_heads, o.qk_nope_head_dim + value_width), "latent", *heads
        )
        self.out = Linear(
            (c.n_heads, value_width),
            (c.d_model,),
            (*heads, "embed"),
            Role(Kind.MATRIX, c.stream),
            "out" in c.attention_biases,
            c.kernel_init(c.residual_std(c.n_heads * value_width, c.d_model)),
            c.dtype,
        )

    def __call__(
        self, x_BLW: jax.Array, inputs: MixerInputs, cache: Any, layer: Layer | None
    ) -> tuple[jax.Array, Any]:
        """Attend to the tokens themselves and those in the cache."""
        queries, latents = self._queries(x_BLW, inputs), self._latents(x_BLW, inputs)
        if cache is None:
            return self.out(self._expanded(queries, latents, inputs)), None
        o_BLHV, cache = self._absorbed(queries, latents, inputs, cache, layer)
        return self.out(o_BLHV), cache

    def _queries(self, x_BLW: jax.Array, inputs: MixerInputs) -> Pair:
        """Return queries [B, L, H, N], and their rotated part [B, L, H, K]."""
        o = self.config.mixer_options
        if o.q_lora_rank:
            x_BLW = self.query_norm(self.query_down(x_BLW))
        q_BLHX = constrain(self.query(x_BLW), "batch", "length", "heads", "head_dim")
        q_BLHN, q_BLHK = jnp.split(q_BLHX, [o.qk_nope_head_dim], axis=-1)
        if inputs.rotation is not None:
            q_BLHK = inputs.rotation.queries(self._halves(q_BLHK))
        return q_BLHN, q_BLHK

    def _latents(self, x_BLW: jax.Array, inputs: MixerInputs) -> Pair:
        """Return the normalized latents [B, L, R], and the rotated keys [B, L, 1, K]."""
        c_BLC = constrain(self.down(x_BLW), "batch", "length", "head_dim")
        c_BLR, k_BLK = jnp.split(c_BLC, [self.config.mixer_options.kv_lora_rank], axis=-1)
        k_BL1K = k_BLK[:, :, None]
        if inputs.rotation is not None:
            k_BL1K = inputs.rotation.keys(self._halves(k_BL1K))
        return self.norm(c_BLR), k_BL1K

    def _halves(self, x_BLHK: jax.Array) -> jax.Array:
        """Reorder pairs (2k, 2k + 1) to halves of a head, if the weights are interleaved."""
        if not self.config.mixer_options.rope_interleaved:
            return x_BLHK
        pairs = x_BLHK.reshape(*x_BLHK.shape[:-1], -1, 2)
        return pairs.swapaxes(-1, -2).reshape(x_BLHK.shape)

    @property
    def score_scale(self) -> float:
        """Scale of the attention scores."""
        c, o = self.config, self.config.mixer_options
        scale = c.attention_scale or (o.qk_nope_head_dim + c.head_dim) ** -0.5
        return scale * c.query_multiplier * score_factor(c, o.mscale_all_dim)

    def _expanded(self, queries: Pair, latents: Pair, inputs: MixerInputs) -> jax.Array:
        """Return the output [B, L, H, V] of attention to expanded keys and values."""
        c, o = self.config, self.config.mixer_options
        (q_BLHN, q_BLHK), (c_BSR, k_BS1K) = queries, latents
        k_BSHN, v_BSHV = jnp.split(self.up(c_BSR), [o.qk_nope_head_dim], axis=-1)
        k_BSHK = jnp.broadcast_to(k_BS1K, (*k_BSHN.shape[:-1], c.head_dim))
        q, k = (jnp.concatenate(x, axis=-1) for x in ((q_BLHN, q_BLHK), (k_BSHN, k_BSHK)))
        return self._attend(q, (k, v_BSHV), inputs.mask, inputs.bias_HLS)

    def _attend(
        self, q: jax.Array, keys_values: Pair, mask: AttentionMask, bias_HLS: jax.Array | None
    ) -> jax.Array:
        """Return the sums of values [B, L, H, V] for queries and keys [B, L or S, H, N + K]."""
        c, (k, v_BSHV) = self.config, keys_values
        names = ("batch", "length", "heads", "head_dim")
        key_width, value_width = q.shape[-1], v_BSHV.shape[-1]
        if c.attention not in UNEQUAL or count_shards("length") > 1:
            M = max(key_width, value_width)
            q, k, v_BSHV = (
                jnp.pad(x, [(0, 0)] * 3 + [(0, M - x.shape[-1])]) for x in (q, k, v_BSHV)
            )
        # Kernels with the fixed scale 1/sqrt(width) are given scaled queries.
        scale = q.shape[-1] ** -0.5
        q *= jnp.asarray(self.score_scale / scale, q.dtype)
        dropout = None
        if c.attention_dropout and not self.deterministic:
            dropout = Dropout(self.make_rng("dropout"), c.attention_dropout)
        q, k, v_BSHV = (constrain(x, *names) for x in (q, k, v_BSHV))
        o_BLHM = attend(
            q,
            k,
            v_BSHV,
            mask,
            kernel=c.attention,
            context_attention=c.context_attention,
            scale=scale,
            softcap=c.attention_softcap,
            bias_HLS=bias_HLS,
            dropout=dropout,
        )
        return o_BLHM[..., :value_width]

    def _absorbed(
        self, queries: Pair, latents: Pair, inputs: MixerInputs, cache: Any, layer: Layer | None
    ) -> tuple[jax.Array, Any]:
        """Return the output [B, L, H, V] of attention to cached latents, and the cache.

        Args:
            queries: queries from `_queries`.
            latents: latents and rotated keys of the same tokens.
            inputs: mask and bias of the scores.
            cache: cache of all layers.
            layer: index of the layer in the cache.
        """
        (q_BLHN, q_BLHK), (c_BLR, k_BL1K) = queries, latents
        c, o = self.config, self.config.mixer_options
        up_RHX = self.up.kernel.astype(c.dtype)
        key_RHN, value_RHV = jnp.split(up_RHX, [o.qk_nope_head_dim], axis=-1)

        def product(axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32).astype(c.dtype)

        q_BLHR = product("BLHN,RHN->BLHR", q_BLHN, key_RHN)
        q_BLHC = jnp.concatenate([q_BLHR, q_BLHK], axis=-1)
        c_BL1C = jnp.concatenate([c_BLR[:, :, None], k_BL1K], axis=-1)
        own = replace(c, attention_scale=self.score_scale)
        # Use the keys as values: slicing off the rotated part would copy the cache.
        o_BLHC, cache = attend_and_cache(own, q_BLHC, (c_BL1C,), inputs, cache, layer)
        return product("BLHR,RHV->BLHV", o_BLHC[..., : o.kv_lora_rank], value_RHV), cache
