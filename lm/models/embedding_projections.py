"""Maps between the widths of embeddings and stack (Lan et al. 2020, §3.1).

Shape letters: D model, E embedding.
"""

from __future__ import annotations

from lm.models.layers import Linear
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Kind, Role


def make_projection(config: TransformerConfig, n_in: int, n_out: int) -> Linear:
    """Build the map from one width to another, with a bias if the layers have biases."""
    c, role = config, Role(Kind.MATRIX, config.stream, "body")
    init, bias = c.kernel_init(c.stddev(n_in, n_out)), c.bias and not c.projection_first
    return Linear((n_in,), (n_out,), ("embed", "residual"), role, bias, init, c.dtype)


def embedding_projections(config: TransformerConfig) -> tuple[Linear, Linear]:
    """Build the maps from embeddings, E → D, and before tied logits, D → E."""
    c = config
    return (
        make_projection(c, c.embedding_size, c.d_model),
        make_projection(c, c.d_model, c.embedding_size),
    )
