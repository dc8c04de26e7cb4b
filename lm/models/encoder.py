"""Encoder: every token sees every other one of its segment; masked tokens are predicted.

Shape letters: B batch, L length, P predictions, D model, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import AttentionMask
from lm.kernels.elementwise import ACTIVATIONS, GATED
from lm.models.decoder import Model
from lm.models.layers import make_norm
from lm.models.task_layers import Bias
from lm.models.transformer import Stack
from lm.models.variables import Kind, Role


class Encoder(Model):
    """Encoder-only Transformer: BERT (Devlin et al. 2018) and its relatives."""

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.stack = Stack(c, c.n_layers, self.deterministic, causal=False)
        transform = Role(Kind.MATRIX, "predicted", "pretraining")
        self.transform = self._linear(c.d_model, "pooled", transform)
        self.transform_norm = make_norm(c, part="pretraining")
        self.logit_bias = Bias(c.vocab_size, Role(Kind.BIAS, c.stream, "pretraining"))

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        types_BL: jax.Array | None = None,
    ) -> jax.Array:
        """Return the logits [B, L, V] of every token, float32."""
        return self.logits(self.hidden(tokens_BL, positions_BL, segment_ids_BL, types_BL))

    def hidden(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        types_BL: jax.Array | None = None,
    ) -> jax.Array:
        """Return the encoded tokens, [B, L, D]; tokens see their own segment."""
        x_BLD, positions_BL = self.embed(tokens_BL, positions_BL, types_BL)
        return self.stack(x_BLD, positions_BL, AttentionMask(False, segment_ids_BL))[0]

    def logits(self, x_BPD: jax.Array) -> jax.Array:
        """Return logits [B, P, V]: dense layer, norm, output matrix and bias."""
        c = self.config
        act = ACTIVATIONS["gelu_tanh" if c.activation in GATED else c.activation]
        x_BPD = self.transform_norm(act(self.transform(x_BPD).astype(c.dtype)))
        return self.logit_bias(super().logits(x_BPD))

    def summary(self, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        """Return the pooled first token, tanh of a dense layer, [B, D]."""
        return jnp.tanh(self.pooler(x_BLD[:, 0]))
