"""Choosing the next token from logits.

Shape letters: B batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lm.decoding.controls import NEG_INF


@dataclass(frozen=True)
class Sampling:
    """How to choose: temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def choose_tokens(logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array) -> jax.Array:
    """One token id a row, [B], from float32 logits.

    Top-k (Fan et al. 2018) keeps the k likeliest; top-p (Holtzman et al. 2020) the fewest
    likeliest whose probabilities, after temperature and top-k, reach p. Each row draws with its
    own key.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, NEG_INF, logits_BV)
    if sampling.top_p < 1:
        descending_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
        probabilities_BV = jax.nn.softmax(descending_BV, axis=-1)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        # The likeliest token stays, however small p is.
        kept_BV = jnp.where(before_BV < max(sampling.top_p, 1e-9), descending_BV, jnp.inf)
        logits_BV = jnp.where(logits_BV < kept_BV.min(-1, keepdims=True), NEG_INF, logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
