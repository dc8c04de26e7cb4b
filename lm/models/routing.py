"""Which experts a token goes to, and how evenly: functions of the router's logits.

A group of tokens that share capacity and balance statistics is a row of the batch, as Mesh
TensorFlow's are: so neither the mesh nor the number of microbatches changes a result.

Shape letters: B batch, L length, E experts, K choices of a token.
"""

from __future__ import annotations

from math import ceil

import jax
import jax.numpy as jnp


def choose(logits_BLE: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k likeliest experts of each token, likeliest first, and their weights [B, L, K].

    One expert is weighted by its probability (Switch, Fedus et al. 2021, eq. 2); several by the
    softmax over their own logits (Mixtral, Jiang et al. 2024, §2.1).
    """
    experts, picked = [], []
    left_BLE = logits_BLE
    for _ in range(k):  # `top_k` would gather the logits of all devices
        experts.append(left_BLE.argmax(-1))
        is_chosen_BLE = jax.nn.one_hot(experts[-1], logits_BLE.shape[-1], dtype=bool)
        picked.append(jnp.where(is_chosen_BLE, logits_BLE, 0).sum(-1))
        left_BLE = jnp.where(is_chosen_BLE, -jnp.inf, left_BLE)
    picked_BLK = jnp.stack(picked, -1)
    weights_BLK = jax.nn.softmax(picked_BLK)
    if k == 1:
        weights_BLK = jnp.exp(picked_BLK - jax.nn.logsumexp(logits_BLE, -1, keepdims=True))
    return jnp.stack(experts, -1), weights_BLK


def capacity(factor: float, length: int, k: int, n_experts: int) -> int:
    """Tokens of a row that an expert takes: `factor` times the even share (Switch, eq. 3)."""
    return min(length, ceil(factor * k * length / n_experts))


def places(experts_BLK: jax.Array, n_experts: int) -> jax.Array:
    """How many of its row come to the same expert before each choice, [B, L, K] int32.

    First choices come before second ones (GShard, Lepikhin et al. 2020, algorithm 1), tokens in
    their order. An expert that is not below `n_experts` is none.
    """
    B, L, K = experts_BLK.shape
    one_hot = jax.nn.one_hot(experts_BLK.swapaxes(1, 2), n_experts, dtype=jnp.int32)
    before = (one_hot.reshape(B, K * L, -1).cumsum(1)).reshape(one_hot.shape) - one_hot
    return (before * one_hot).sum(-1).swapaxes(1, 2)


def load(experts_BLK: jax.Array, is_token_BL: jax.Array, n_experts: int) -> jax.Array:
    """Each expert's part of the choices of a row's tokens, before any are dropped, [B, E]."""
    one_hot = jax.nn.one_hot(experts_BLK, n_experts).sum(2) / experts_BLK.shape[-1]
    return mean(one_hot, is_token_BL)


def balance_loss(logits_BLE: jax.Array, load_BE: jax.Array, is_token_BL: jax.Array) -> jax.Array:
    """E Σ f_i P_i of each row, [B]: 1 if all is even (Switch, eq. 4 to 6).

    f_i is the load, P_i the mean probability; only this has a gradient.
    """
    share_BE = mean(jax.nn.softmax(logits_BLE), is_token_BL)
    return logits_BLE.shape[-1] * (load_BE * share_BE).sum(-1)


def z_loss(logits_BLE: jax.Array, is_token_BL: jax.Array) -> jax.Array:
    """Mean squared log-partition of each row's tokens, [B] (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return mean(jax.nn.logsumexp(logits_BLE, -1, keepdims=True) ** 2, is_token_BL)[:, 0]


def mean(x_BLE: jax.Array, is_token_BL: jax.Array) -> jax.Array:
    """Over the tokens of each row, [B, E]; of a row without tokens 0."""
    mask_BL = is_token_BL.astype(jnp.float32)
    total_BE = (x_BLE * mask_BL[..., None]).sum(1)
    return total_BE / jnp.maximum(mask_BL.sum(1), 1)[:, None]
