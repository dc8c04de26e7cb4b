"""Disentangled attention: contents attend to contents and relative positions, and vice versa.

DeBERTa (He et al. 2021, §3.1), by default with the buckets and shared projections of version 3.

Shape letters: B batch, L length, R rows of the table of relative positions, D model, W width of the
input, H heads, K head dim.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.models.attention import Attention, MixerInputs
from lm.models.cache import Layer
from lm.models.layers import Linear, make_norm
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Kind, Role, param


def log_buckets(distances: np.ndarray, n_rows: int, max_distance: int) -> np.ndarray:
    """Return the row of each distance, query position − key position, in the table.

    Half of the rows represent single distances, from 1 − R/4 to R/4 − 1; beyond these, buckets grow
    logarithmically up to `max_distance`, keeping the sign (DeBERTa's released code).

    Args:
        distances: integers of any shape.
        n_rows: R; distance 0 has row R/2.
        max_distance: distance from which all use the first or the last row.
    """
    middle = n_rows // 4
    sizes = np.maximum(np.abs(distances), 1).astype(np.float32)
    growth = np.log(sizes / np.float32(middle)) / np.log(np.float32((max_distance - 1) / middle))
    far = np.sign(distances) * (np.ceil(growth * (middle - 1)) + middle)
    buckets = np.where(np.abs(distances) <= middle, distances, far).astype(int)
    return np.clip(buckets + n_rows // 2, 0, n_rows - 1)


class RelativeTable(nn.Module):
    """Table of a stack's relative positions."""

    config: TransformerConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        """Return the table [R, D]."""
        c = self.config
        role, shape = Role(Kind.POSITION_BIAS, c.stream, inputs=1), (c.relative_buckets, c.d_model)
        table_RD = param(self, "embedding", c.table_init, shape, ("positions", "embed"), role)
        return make_norm(c, "norm")(table_RD) if c.mixer_options.relative_norm else table_RD


class DisentangledAttention(Attention):
    """Self-attention whose scores are the sum of n = 3 products, divided by sqrt(n K).

    They are query · key, query · position and key · position. Positions are the stack's table,
    projected by the layer's query and key kernels or by separate ones. Options omit a product.
    """

    def setup(self) -> None:
        super().setup()
        c, terms = self.config, self.config.mixer_options.relative_terms
        self.dropout = nn.Dropout(c.dropout, deterministic=self.deterministic)
        self.reads_positions = terms in ("both", "c2p")
        self.is_read_from_positions = terms in ("both", "p2c")
        if not c.mixer_options.relative_shared:
            init = c.kernel_init(c.std(c.d_model, c.n_heads * c.head_dim))
            names, role = ("embed", "heads", "head_dim"), Role(Kind.MATRIX, c.stream)
            shapes, bias = ((c.d_model,), (c.n_heads, c.head_dim)), "key" in c.attention_biases
            if self.reads_positions:
                self.position_key = Linear(*shapes, names, role, bias, init, c.dtype)
            if self.is_read_from_positions:
                self.position_query = Linear(*shapes, names, role, bias, init, c.dtype)

    @classmethod
    def init_cache(cls, config: TransformerConfig, n_layers: int, batch: int, length: int) -> Any:
        raise NotImplementedError("disentangled attention is for encoders only")

    def __call__(
        self, x_BLW: jax.Array, inputs: MixerInputs, cache: Any, layer: Layer | None
    ) -> tuple[jax.Array, Any]:
        """Attend to the tokens themselves; `inputs.bias_HLS` is the table [R, D]."""
        c, table_RD = self.config, inputs.bias_HLS
        assert table_RD is not None
        table_1RD = self.dropout(table_RD)[None]
        o, n_rows = c.mixer_options, c.relative_buckets
        share = (1 + self.reads_positions + self.is_read_from_positions) ** -0.5
        q_BLHK, (k_BLHK, v_BLHK) = self.queries(x_BLW) * share, self.keys_values(x_BLW)
        rows_LL = np.arange(x_BLW.shape[1])[:, None] - np.arange(x_BLW.shape[1])
        if o.relative_log:
            rows_LL = log_buckets(rows_LL, n_rows, c.relative_max_distance)
        else:
            rows_LL = np.clip(rows_LL + n_rows // 2, 0, n_rows - 1)
        terms: list[jax.Array] = []
        if self.reads_positions:
            k_RHK = (self.key if o.relative_shared else self.position_key)(table_1RD)[0]
            terms.append(_pick(q_BLHK, k_RHK, rows_LL))
        if self.is_read_from_positions:
            q_RHK = (self.queries if o.relative_shared else self.position_query)(table_1RD)[0]
            terms.append(_pick(k_BLHK, q_RHK * share, rows_LL.T).swapaxes(2, 3))
        bias_BHLL = sum(terms[1:], terms[0]) * c.score_scale if terms else None
        o_BLHK = self._attend(q_BLHK, (k_BLHK, v_BLHK), inputs.mask, bias_BHLL)
        return self.out(o_BLHK), None


def _pick(x_BLHK: jax.Array, table_RHK: jax.Array, rows_LL: np.ndarray) -> jax.Array:
    """Return the products [B, H, L, L] of each token with the table rows for all others."""
    products_BHLR = jnp.einsum(
        "BLHK,RHK->BHLR", x_BLHK, table_RHK, preferred_element_type=jnp.float32
    )
    return jnp.take_along_axis(products_BHLR, jnp.asarray(rows_LL)[None, None], axis=-1)
