"""Cross-entropy of logits against integer targets.

Shape letters: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(logits_BLV: jax.Array, targets_BL: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats, [B, L], computed in float32."""
    logits_BLV = logits_BLV.astype(jnp.float32)
    picked_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BLV, axis=-1) - picked_BL
