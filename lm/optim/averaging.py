"""Parameter averaging: exponential moving averages and schedule-free learning.

The optimizer moves a point z, gradients are taken at y between z and the average x, and x is stored
as the parameters: it is evaluated, saved and exported. The optimizer state holds z - x, which is 0
at the start of training from any parameters.

    y = β x + (1 - β) z
    z ← z + update(∇ at y)
    x ← (1 - c) x + c z,  c = w / s,  s ← d s + w

Schedule-free learning (Defazio et al. 2024, arXiv 2405.15682; w as in its released code) uses
w = rate² and d = 1. An exponential moving average uses β = 0, w = 1 and decay d, with bias
correction (Kingma and Ba 2015, §7.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

Tree = Any


class AveragedState(NamedTuple):
    """State of an optimizer whose parameters are averages.

    Attributes:
        step: number of updates so far.
        weight: s, the sum of weights of the average.
        offset: z - x, a tree like the parameters.
        state: state of the wrapped optimizer.
    """

    step: jax.Array
    weight: jax.Array
    offset: Tree
    state: Tree


class Averaged(NamedTuple):
    """Gradient transformation for averaged parameters; gradients are taken at `point`."""

    init: Callable[[Tree], AveragedState]
    update: Callable[..., tuple[Tree, AveragedState]]
    point: Callable[[AveragedState, Tree], Tree]


def averaged(
    optimizer: optax.GradientTransformation, schedule: optax.Schedule, options: ConfigDict
) -> Averaged:
    """Average the parameters of an optimizer, by `optimizer.ema` or schedule-free learning.

    Args:
        optimizer: the optimizer.
        schedule: learning rate of a step.
        options: section "optimizer" of the configuration.
    """
    is_free = options.name == "schedule_free"
    momentum = options.schedule_free.b1 if is_free else 0.0
    keep = 1.0 if is_free else options.ema

    def init(params: Tree) -> AveragedState:
        zero, offset = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        return AveragedState(jnp.zeros((), jnp.int32), zero, offset, optimizer.init(params))

    def point(state: AveragedState, params: Tree) -> Tree:
        return jax.tree.map(lambda x, z: x + (1 - momentum) * z, params, state.offset)

    def update(
        grads: Tree, state: AveragedState, params: Tree = None
    ) -> tuple[Tree, AveragedState]:
        moves, inner = optimizer.update(grads, state.state, point(state, params))
        new = jnp.square(schedule(state.step)) if is_free else jnp.ones(())
        weight = keep * state.weight + new
        c = new / jnp.where(weight > 0, weight, 1)
        ahead = jax.tree.map(jnp.add, state.offset, moves)
        updates = jax.tree.map(lambda z: c * z, ahead)
        offset = jax.tree.map(lambda z: (1 - c) * z, ahead)
        return updates, AveragedState(state.step + 1, weight, offset, inner)

    return Averaged(init, update, point)
