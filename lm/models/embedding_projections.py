"""Maps between the width of embeddings and that of the stack (Lan et al. 2020, §3.1).

Shape letters: D model, E embedding.
"""

from __future__ import annotations

from lm.models.layers import Linear
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Kind, Role


def make_projection(config: TransformerConfig, n_in: int, n_out: int) -> Linear:
    """Build the map of one width to another; it has a bias where the layers have."""
    c, role = config, Role(Kind.MATRIX, config.stream, "body")
    init = c.kernel_init(c.stddev(n_in, n_out))
    return Linear((n_in,), (n_out,), ("embed", "residual"), role, c.bias, init, c.dtype)


def embedding_projections(config: TransformerConfig) -> tuple[Linear, Linear]:
    """Build the maps E → D of embeddings and D → E before tied logits."""
    c = config
    return (
        make_projection(c, c.embedding_size, c.d_model),
        make_projection(c, c.d_model, c.embedding_size),
    )
