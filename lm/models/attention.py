"""Multi-head attention with grouped key/value heads: to the own sequence, or to an encoder's.

Shape letters: B batch, L queries, S keys, D model, H heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import AttentionMask, Dropout
from lm.models.cache import KeyValue, write
from lm.models.layers import Linear, make_norm
from lm.models.positions import rotate
from lm.models.sharded_attention import attend
from lm.models.transformer_config import TransformerConfig
from lm.parallel.sharding import constrain


class Attention(nn.Module):
    """Queries of x, keys and values of x or of a source."""

    config: TransformerConfig
    deterministic: bool
    kernel: str

    def setup(self) -> None:
        c = self.config
        # Without 1/sqrt(K) in the scores, the fan-in rule has it in the query's deviation (T5).
        unscaled = c.init == "fan_in" and c.attention_scale == 1
        query_std = c.std(c.d_model, c.n_heads * c.head_dim) * (
            c.base_head_dim**-0.5 if unscaled else 1.0
        )
        key_std = c.std(c.d_model, c.n_kv_heads * c.head_dim)

        def heads(n: int, axis: str, std: float) -> Linear:
            init, names = c.kernel_init(std), ("embed", axis, "head_dim")
            return Linear((c.d_model,), (n, c.head_dim), names, c.query_bias, init, c.dtype)

        self.query = heads(c.n_heads, "heads", query_std)
        self.key = heads(c.n_kv_heads, "kv_heads", key_std)
        self.value = heads(c.n_kv_heads, "kv_heads", key_std)
        self.out = Linear(
            (c.n_heads, c.head_dim),
            (c.d_model,),
            ("heads", "head_dim", "embed"),
            c.attention_output_bias,
            c.kernel_init(c.residual_std(c.n_heads * c.head_dim, c.d_model)),
            c.dtype,
        )
        if c.qk_norm:
            self.query_norm, self.key_norm = make_norm(c), make_norm(c)

    def queries(self, x_BLD: jax.Array) -> jax.Array:
        """[B, L, H, K], normalised over each head if the model does that (Henry et al. 2020)."""
        q_BLHK = self.query(x_BLD)
        if self.config.qk_norm:
            q_BLHK = self.query_norm(q_BLHK)
        q_BLHK *= jnp.asarray(self.config.query_multiplier, q_BLHK.dtype)
        return constrain(q_BLHK, "batch", "length", "heads", "head_dim")

    def keys_values(self, source_BSD: jax.Array) -> KeyValue:
        """What the queries attend to, [B, S, G, K] each."""
        names = ("batch", "length", "kv_heads", "head_dim")
        k_BSGK = self.key(source_BSD)
        if self.config.qk_norm:
            k_BSGK = self.key_norm(k_BSGK)
        return constrain(k_BSGK, *names), constrain(self.value(source_BSD), *names)

    def to_itself(
        self,
        x_BLD: jax.Array,
        visibility: AttentionMask,
        angles_BLK: jax.Array | None,
        bias_HLS: jax.Array | None,
        all_layers: KeyValue | None,
        layer: jax.Array | None,
    ) -> tuple[jax.Array, KeyValue | None]:
        """Self-attention [B, L, D]; when decoding, of layer number `layer` to its tokens so far,
        and the keys and values of all layers with it."""
        q_BLHK = self.queries(x_BLD)
        keys_values = k_BSGK, v_BSGK = self.keys_values(x_BLD)
        if angles_BLK is not None:
            q_BLHK = rotate(q_BLHK, angles_BLK)
            keys_values = rotate(k_BSGK, angles_BLK), v_BSGK
        if all_layers is not None:
            assert layer is not None
            all_layers, keys_values = write(all_layers, layer, visibility.offset, keys_values)
        return self._attend(q_BLHK, keys_values, visibility, bias_HLS), all_layers

    def to_source(
        self, x_BLD: jax.Array, keys_values: KeyValue, visibility: AttentionMask
    ) -> jax.Array:
        """Cross-attention [B, L, D] to what `keys_values` made of an encoder's output."""
        q_BLHK = self.queries(x_BLD)
        return self._attend(q_BLHK, keys_values, visibility, None)

    def _attend(
        self,
        q_BLHK: jax.Array,
        keys_values: KeyValue,
        visibility: AttentionMask,
        bias_HLS: jax.Array | None,
    ) -> jax.Array:
        c = self.config
        dropout = None
        if c.attention_dropout and not self.deterministic:
            dropout = Dropout(self.make_rng("dropout"), c.attention_dropout)
        o_BLHK = attend(
            q_BLHK,
            *keys_values,
            visibility,
            kernel=self.kernel,
            across=c.context_attention,
            scale=c.score_scale,
            softcap=c.attention_softcap,
            bias_HLS=bias_HLS,
            dropout=dropout,
        )
        return self.out(o_BLHK)
