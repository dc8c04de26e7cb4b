"""Task heads: classes of a text, next sentences, answer spans.

Shape letters: B batch, L length, D model, C classes.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from lm.models.task_layers import last_of_row, mean_of_row
from lm.models.transformer_config import TransformerConfig


class TaskHeads(nn.Module):
    """Heads over whole texts and over tokens, for the models of `decoder.py`.

    Attributes:
        config: configuration.
        deterministic: True turns dropout off; `clone(deterministic=False)` is the model to train.
    """

    config: TransformerConfig
    deterministic: bool = True

    def pooled(self, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        """Return the embedding [B, D] of a text.

        It is the family's `summary`, or the mean of the tokens (Reimers and Gurevych 2019, §3).
        """
        if self.config.pooling == "mean":
            return mean_of_row(x_BLD, segment_ids_BL)
        return self.summary(x_BLD, segment_ids_BL)

    def summary(self, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        """Return the hidden state of the last token, [B, D] (Radford et al. 2018, §3.2)."""
        return last_of_row(x_BLD, segment_ids_BL)

    def classify(self, x_BD: jax.Array) -> jax.Array:
        """Return class logits [B, C], float32, from the result of `pooled`."""
        return self.classifier(self._scale_output(self.dropout(x_BD)))

    def next_sentence(self, x_BD: jax.Array) -> jax.Array:
        """Return logits [B, 2] of "B follows A" and "B does not" (Devlin et al. 2018, §3.1)."""
        return self.sentence_head(self._scale_output(x_BD))

    def spans(self, x_BLD: jax.Array) -> jax.Array:
        """Return start and end logits of answers, [B, L, 2] (Devlin et al. 2018, §4.2)."""
        return self.span_head(self._scale_output(self.dropout(x_BLD)))
