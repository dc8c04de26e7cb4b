"""Cautious updates and cautious weight decay.

Liang et al. 2024 (arXiv 2411.16085), Algorithm 1: update only elements whose direction agrees in
sign with the gradient, rescaled to compensate. Chen et al. 2025 (arXiv 2510.12402): decay only
elements that the direction also moves toward zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import optax
from ml_collections import ConfigDict

if TYPE_CHECKING:
    from lm.models.variables import ParamInfo
    from lm.optim.optimizers import ParamTable

Tree = Any


def cautious(
    direction: optax.GradientTransformation, options: ConfigDict, table: ParamTable
) -> optax.GradientTransformation:
    """Build a direction with weight decay, masked by `optimizer.cautious`.

    Args:
        direction: update direction, without decay.
        options: section "optimizer" of the configuration.
        table: roles of the parameters.
    """

    def agreeing(info: ParamInfo, u: jax.Array, g: jax.Array) -> jax.Array:
        agrees = u * g > 0
        axes = tuple(range(info.n_stacked, u.ndim))  # axes of a single matrix or vector
        n = agrees.sum(axes, keepdims=True)
        return u * agrees * (agrees.size // n.size) / (n + 1)

    def decayed(u: jax.Array, w: jax.Array, decays: bool) -> jax.Array:
        if not decays:
            return u
        kept = u * w >= 0 if options.cautious in ("decay", "both") else True
        return u + options.weight_decay * w * kept

    def update(grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        u, state = direction.update(grads, state, params)
        if options.cautious in ("updates", "both"):
            u = table.map(agreeing, u, grads)
        return jax.tree.map(decayed, u, params, table.decay_mask(params)), state

    return optax.GradientTransformation(direction.init, update)
