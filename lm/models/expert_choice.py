"""Expert choice for each token: scores, groups of experts, and output weights.

Shape letters: B batch, L length, E experts, K choices of a token, G groups of experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from lm.models.experts_config import ExpertsConfig


def has_normalized_weights(config: ExpertsConfig) -> bool:
    """Return whether the weights of a token's experts add up to a constant."""
    default = "normalized" if config.experts_per_token > 1 else "probability"
    return {"auto": default}.get(config.expert_weights, config.expert_weights) == "normalized"


def has_groups(config: ExpertsConfig) -> bool:
    """Return whether experts are chosen from only some of the groups."""
    return config.expert_groups_per_token < config.expert_groups


def router_scores(config: ExpertsConfig, logits_BLE: jax.Array) -> jax.Array:
    """Return the scores of all experts: probabilities, or the sigmoid of each logit."""
    is_sigmoid = config.router_scores == "sigmoid"
    return jax.nn.sigmoid(logits_BLE) if is_sigmoid else jax.nn.softmax(logits_BLE)


def router_probabilities(config: ExpertsConfig, logits_BLE: jax.Array) -> jax.Array:
    """Return the scores of all experts divided by their sum (DeepSeek-V3, 2024, eq. 19)."""
    scores_BLE = router_scores(config, logits_BLE)
    if config.router_scores == "softmax":
        return scores_BLE
    return scores_BLE / jnp.maximum(scores_BLE.sum(-1, keepdims=True), 1e-20)


def choose_experts(
    config: ExpertsConfig, logits_BLE: jax.Array, bias_E: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return the experts with the largest scores of each token, and weights, [B, L, K] each.

    The weight of an expert is its score (Switch, Fedus et al. 2021, eq. 2), or its score divided by
    the sum over the token's experts (Mixtral, Jiang et al. 2024, §2.1), times a constant.

    Args:
        config: configuration of the experts.
        logits_BLE: logits of the router.
        bias_E: added to the scores when experts are chosen; weights do not depend on it (Wang et
            al. 2024, arXiv 2408.15664, eq. 3).
    """
    c, left_BLE = config, logits_BLE  # in the order of the scores
    if bias_E is not None or has_groups(c):
        left_BLE = router_scores(c, logits_BLE) + (0 if bias_E is None else bias_E)
    if has_groups(c):
        is_open_BLE = in_best_groups(c, left_BLE)
        left_BLE = jnp.where(is_open_BLE, left_BLE, -jnp.inf)
    experts, picked = [], []
    for expert_BL, is_chosen_BLE in one_hot_top_k(left_BLE, c.experts_per_token):
        experts.append(expert_BL)
        picked.append(jnp.where(is_chosen_BLE, logits_BLE, 0).sum(-1))
    picked_BLK = jnp.stack(picked, -1)
    if c.router_scores == "sigmoid":
        weights_BLK = jax.nn.sigmoid(picked_BLK)
        if has_normalized_weights(c):
            weights_BLK /= jnp.maximum(weights_BLK.sum(-1, keepdims=True), 1e-20)
    elif has_normalized_weights(c):
        weights_BLK = jax.nn.softmax(picked_BLK)
    else:
        weights_BLK = jnp.exp(picked_BLK - jax.nn.logsumexp(logits_BLE, -1, keepdims=True))
    if c.expert_weights_scale != 1:
        weights_BLK *= c.expert_weights_scale
    return jnp.stack(experts, -1), weights_BLK


def in_best_groups(config: ExpertsConfig, scores_BLE: jax.Array) -> jax.Array:
    """Return whether each expert belongs to one of a token's groups, [B, L, E] bool.

    Groups consist of neighboring experts. The group with the largest sum of its
    `expert_group_best` largest scores comes first (DeepSeek-V2 2024, §2.2.2: 1; DeepSeek-V3 2024,
    released code: 2).
    """
    c = config
    scores_BLGX = scores_BLE.reshape(*scores_BLE.shape[:-1], c.expert_groups, -1)
    is_best_BLGX = in_top_k(scores_BLGX, c.expert_group_best)
    sums_BLG = jnp.where(is_best_BLGX, scores_BLGX, 0).sum(-1)
    is_open_BLG = in_top_k(sums_BLG, c.expert_groups_per_token)
    return jnp.repeat(is_open_BLG, scores_BLGX.shape[-1], axis=-1)


def in_top_k(x: jax.Array, k: int) -> jax.Array:
    """Return whether each number is among the k largest along the last axis."""
    return jnp.stack([is_best for _, is_best in one_hot_top_k(x, k)]).any(0)


def one_hot_top_k(x: jax.Array, k: int) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yield the index and one-hot mask of each of the k largest numbers along the last axis.

    `top_k` would gather the numbers from all devices.
    """
    for _ in range(k):
        index = x.argmax(-1)
        is_best = jax.nn.one_hot(index, x.shape[-1], dtype=bool)
        yield index, is_best
        x = jnp.where(is_best, -jnp.inf, x)
