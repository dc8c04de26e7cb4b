"""Encoder: every token attends to its whole segment; masked tokens are predicted.

Shape letters: B batch, L length, P predictions, D model, E embedding, W width of the generator,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import AttentionMask
from lm.kernels.elementwise import ACTIVATIONS, output_activation
from lm.models.decoder import Model, position_table
from lm.models.generator import Generator, generator_config
from lm.models.layers import make_norm
from lm.models.positions import has_position_table
from lm.models.task_layers import Bias
from lm.models.transformer import Stack
from lm.models.variables import Kind, Role
from lm.parallel.mesh import constrain

POOLERS: dict[str, Callable[[jax.Array], jax.Array]] = {"tanh": jnp.tanh, **ACTIVATIONS}


class Encoder(Model):
    """Encoder-only Transformer: BERT (Devlin et al. 2018) and its relatives."""

    def setup(self) -> None:
        super().setup()
        c = self.config
        if has_position_table(c) and c.positions != "learned":
            self.positions = position_table(c)
        stack = Stack
        if c.first_conv:
            from lm.models.convolved_stack import ConvolvedStack

            stack = ConvolvedStack
        self.stack = stack(c, c.n_layers, self.deterministic, causal=False)
        transform = Role(Kind.MATRIX, "predicted", "pretraining")
        self.transform = self._linear(self.output_width, "pooled", transform, c.transform_bias)
        self.transform_norm = make_norm(c, part="pretraining")
        self.logit_bias = Bias(c.vocab_size, Role(Kind.BIAS, c.stream, "pretraining"))
        of_tokens = Role(Kind.MATRIX, c.stream, "pretraining")
        self.replaced_transform = self._linear(c.d_model, "pooled", of_tokens)
        self.replaced_head = self._linear(1, "classes", replace(of_tokens, kind=Kind.HEAD))
        self.generator = Generator(generator_config(c), self.deterministic)

    @property
    def output_width(self) -> int:
        return self.config.embedding_size or self.config.d_model

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
        """Return the encoded tokens, [B, L, D]; tokens attend within their segment."""
        c, parts = self.config, ("embedding_norm", "embedding_projection")
        if c.embedding_size and c.projection_first:
            parts = ("normed_projection", "")
        names = ("tokens", "positions", *parts)
        x_BLD, positions_BL = self.embed(tokens_BL, positions_BL, types_BL, names)
        return self.stack(x_BLD, positions_BL, AttentionMask(False, segment_ids_BL))[0]

    def normed_projection(self, x_BLE: jax.Array) -> jax.Array:
        """Project embeddings [B, L, E] and normalize the result, [B, L, D]."""
        return self.embedding_norm(self.embedding_projection(x_BLE))

    def logits(self, x_BPD: jax.Array) -> jax.Array:
        """Return logits [B, P, V]: dense layer, norm, output matrix and bias."""
        return self.logit_bias(super().logits(self._transformed(x_BPD)))

    def _transformed(self, x: jax.Array) -> jax.Array:
        c = self.config
        act = ACTIVATIONS[output_activation(c.transform_activation, c.activation)]
        return self.transform_norm(act(self.transform(x).astype(c.dtype)))

    # --- tasks

    def summary(self, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        """Return the first token's vector [B, D]; BERT's pooler applies a layer and activation."""
        if self.config.task_transform:
            return x_BLD[:, 0]
        return POOLERS[self.config.pooler_activation](self.pooler(x_BLD[:, 0]))

    def classify(self, x_BD: jax.Array) -> jax.Array:
        return super().classify(self._task_input(x_BD))

    def spans(self, x_BLD: jax.Array) -> jax.Array:
        return super().spans(self._task_input(x_BLD))

    def _task_input(self, x: jax.Array) -> jax.Array:
        return self._transformed(x) if self.config.task_transform else x

    # --- replaced tokens (ELECTRA)

    def generator_hidden(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
    ) -> jax.Array:
        """Return the generator's hidden states [B, L, W], from this model's embeddings."""
        names = ("tokens", "positions", "embedding_norm", "")
        x_BLE, positions_BL = self.embed(tokens_BL, positions_BL, names=names)
        return self.generator(x_BLE, positions_BL, segment_ids_BL)

    def generator_logits(self, x_BPW: jax.Array) -> jax.Array:
        """Return the generator's logits [B, P, V], float32."""
        logits_BPV = self.tokens.attend(self.generator.transformed(x_BPW))
        return self.generator.biased(constrain(logits_BPV, "rows", "length", "vocab"))

    def replaced(self, x_BLD: jax.Array) -> jax.Array:
        """Return the logits [B, L] of "this token was replaced" (Clark et al. 2020, §2)."""
        c = self.config
        act = ACTIVATIONS[output_activation("family", c.activation)]
        y_BLD = act(self.replaced_transform(x_BLD).astype(c.dtype))
        return self.replaced_head(self._scale_output(y_BLD))[..., 0]
