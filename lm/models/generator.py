"""Generator of ELECTRA (Clark et al. 2020): a small encoder on the discriminator's embeddings.

Shape letters: B batch, L length, P predictions, E embedding, W width of the generator,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax

from lm.kernels.dot_product_attention import AttentionMask
from lm.kernels.elementwise import ACTIVATIONS, output_activation
from lm.models.embedding_projections import make_projection
from lm.models.layers import Linear, make_norm
from lm.models.task_layers import Bias
from lm.models.transformer import Stack
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Kind, Role


def generator_config(config: TransformerConfig) -> TransformerConfig:
    """Return the configuration of the generator's stack.

    Its heads have the discriminator's width; their number and the width of feed-forward layers
    shrink in proportion to the generator's width.
    """
    c, width = config, config.generator_width or config.d_model
    return replace(
        c,
        n_layers=c.generator_layers or c.n_layers,
        d_model=width,
        n_heads=c.n_heads * width // c.d_model,
        n_kv_heads=c.n_kv_heads * width // c.d_model,
        d_ff=c.d_ff * width // c.d_model,
        embedding_size=c.embedding_size or c.d_model,
    )


class Generator(nn.Module):
    """Stack and output layer of a masked language model without its own tables.

    Attributes:
        config: configuration from `generator_config`.
        deterministic: True turns dropout off.
    """

    config: TransformerConfig
    deterministic: bool

    def setup(self) -> None:
        c = self.config
        if c.embedding_size != c.d_model:
            self.projection = make_projection(c, c.embedding_size, c.d_model)
        self.stack = Stack(c, c.n_layers, self.deterministic, causal=False)
        role = Role(Kind.MATRIX, "predicted", "pretraining")
        init, names = c.kernel_init(c.std(c.d_model, c.embedding_size)), ("embed", "pooled")
        widths = (c.d_model,), (c.embedding_size,)
        self.transform = Linear(*widths, names, role, c.transform_bias, init, c.dtype)
        self.transform_norm = make_norm(c, part="pretraining")
        self.logit_bias = Bias(c.vocab_size, Role(Kind.BIAS, "predicted", "pretraining"))

    def __call__(
        self, x_BLE: jax.Array, positions_BL: jax.Array, segment_ids_BL: jax.Array | None
    ) -> jax.Array:
        """Return the hidden states [B, L, W] of embedded tokens."""
        x_BLW = self.projection(x_BLE) if x_BLE.shape[-1] != self.config.d_model else x_BLE
        return self.stack(x_BLW, positions_BL, AttentionMask(False, segment_ids_BL))[0]

    def transformed(self, x_BPW: jax.Array) -> jax.Array:
        """Return the input of the multiplication with the token table, [B, P, E]."""
        c = self.config
        act = ACTIVATIONS[output_activation(c.transform_activation, c.activation)]
        return self.transform_norm(act(self.transform(x_BPW)))

    def biased(self, logits_BPV: jax.Array) -> jax.Array:
        """Return the logits with their bias added."""
        return self.logit_bias(logits_BPV)
