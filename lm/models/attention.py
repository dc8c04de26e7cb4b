"""Multi-head self-attention with grouped key/value heads.

Shape letters: B batch, L queries, S cached keys, D model, H heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import flax.linen as nn
import jax
from jax import lax

from lm.kernels.attention import Dropout, Visibility, attention
from lm.models.config import TransformerConfig
from lm.models.layers import Linear
from lm.models.positions import rotate
from lm.parallel.rules import constrain

KeyValue = tuple[jax.Array, jax.Array]


class SelfAttention(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        visibility: Visibility,
        angles_BLK: jax.Array | None,
        cached: KeyValue | None,
        deterministic: bool,
    ) -> tuple[jax.Array, KeyValue | None]:
        """The attended values [B, L, D] and, when decoding, the layer's keys and values so far."""
        c = self.config

        def heads(name: str, n: int, axis: str) -> jax.Array:
            linear = Linear(
                (c.d_model,),
                (n, c.head_dim),
                ("embed", axis, "head_dim"),
                c.bias,
                c.init_std,
                c.dtype,
                name=name,
            )
            return constrain(linear(x_BLD), "batch", "length", axis, "head_dim")

        q_BLHK = heads("query", c.n_heads, "heads")
        k_BLGK = heads("key", c.n_kv_heads, "kv_heads")
        v_BLGK = heads("value", c.n_kv_heads, "kv_heads")
        if angles_BLK is not None:
            q_BLHK, k_BLGK = rotate(q_BLHK, angles_BLK), rotate(k_BLGK, angles_BLK)
        if cached is not None:
            start = (0, visibility.offset, 0, 0)
            k_BLGK = lax.dynamic_update_slice(cached[0], k_BLGK.astype(cached[0].dtype), start)
            v_BLGK = lax.dynamic_update_slice(cached[1], v_BLGK.astype(cached[1].dtype), start)
            cached = (k_BLGK, v_BLGK)
        dropout = None
        if c.attention_dropout and not deterministic:
            dropout = Dropout(self.make_rng("dropout"), c.attention_dropout)
        o_BLHK = attention(q_BLHK, k_BLGK, v_BLGK, visibility, kernel=c.attention, dropout=dropout)
        out = Linear(
            (c.n_heads, c.head_dim),
            (c.d_model,),
            ("heads", "head_dim", "embed"),
            c.bias,
            c.residual_std,
            c.dtype,
            name="out",
        )
        return out(o_BLHK), cached
