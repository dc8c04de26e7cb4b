"""Noise on token embeddings during training: NEFTune (Jain et al. 2023, arXiv 2310.05914).

Shape letters: B batch, L length, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.models.layers import Embedding


@contextmanager
def embedding_noise(alpha: float, lengths_BL: jax.Array | None) -> Iterator[None]:
    """Add noise to the token embeddings that a model looks up in this context (algorithm 1).

    It is uniform in ± alpha / sqrt(length · D), from the random stream of dropout: different in
    each step and row, but independent of the mesh.

    Args:
        alpha: scale; 0: no noise.
        lengths_BL: tokens of the sequence that each token is in; None: no noise.
    """
    if not alpha or lengths_BL is None:
        yield
        return
    shrink_BL1 = jax.lax.rsqrt(jnp.maximum(lengths_BL, 1).astype(jnp.float32))[..., None]

    def intercept(method: Callable, args: Any, options: Any, context: Any) -> Any:
        module, found = context.module, method(*args, **options)
        is_look_up = isinstance(module, Embedding) and context.method_name == "__call__"
        if not is_look_up or module.row_name != "vocab":
            return found
        noise_BLD = jax.random.uniform(module.make_rng("dropout"), found.shape, minval=-1, maxval=1)
        noise_BLD *= shrink_BL1 * (alpha * module.width**-0.5)
        return found + noise_BLD.astype(found.dtype)

    with nn.intercept_methods(intercept):
        yield
