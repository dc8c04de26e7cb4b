"""Position information: sinusoidal vectors and rotary embeddings.

Shape letters: B batch, L length, D model, H heads, K head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sinusoidal(positions_BL: jax.Array, d_model: int) -> jax.Array:
    """[B, L, D]: PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i+1) = cos (Vaswani 2017 §3.5)."""
    frequencies = 10_000.0 ** (-jnp.arange(0, d_model, 2) / d_model)
    angles = positions_BL[..., None] * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*angles.shape[:-1], -1)


def rotary_angles(positions_BL: jax.Array, head_dim: int, theta: float) -> jax.Array:
    """Rotation angles [B, L, K/2] of each position (Su et al. 2021, eq. 15)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2) / head_dim)
    return positions_BL[..., None] * frequencies


def rotate(x_BLHK: jax.Array, angles_BLK: jax.Array) -> jax.Array:
    """`x` with the pairs (k, k + K/2) of every head rotated by the angles (Llama's layout)."""
    cos_BL1K = jnp.cos(angles_BLK)[:, :, None, :]
    sin_BL1K = jnp.sin(angles_BLK)[:, :, None, :]
    a_BLHK, b_BLHK = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [a_BLHK * cos_BL1K - b_BLHK * sin_BL1K, a_BLHK * sin_BL1K + b_BLHK * cos_BL1K], axis=-1
    )
    return rotated.astype(x_BLHK.dtype)
