"""NorMuon: Muon updates normalized per neuron by a running root mean square.

Li et al. 2025 (arXiv 2510.05491); as in the released code, the norm of each matrix is preserved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lm.optim.optimizers import descend

if TYPE_CHECKING:
    from lm.models.variables import ParamInfo
    from lm.optim.optimizers import ParamTable

Tree = Any


def muon_by_neuron(
    direction: optax.GradientTransformation,
    schedule: optax.Schedule,
    options: ConfigDict,
    table: ParamTable,
) -> optax.GradientTransformation:
    """Build Muon for matrices, normalized per neuron if configured.

    Args:
        direction: Muon without weight decay, at learning rate -1.
        schedule: learning rate of a step.
        options: section "optimizer" of the configuration.
        table: roles of the parameters.
    """
    b2 = options.muon.neuron_b2
    neurons = by_neuron(b2, table) if b2 else optax.identity()
    return descend(schedule, options, table, direction, neurons)


def by_neuron(b2: float, table: ParamTable) -> optax.GradientTransformation:
    """Build the per-neuron normalization of Muon's updates.

    Args:
        b2: decay of the running mean square of each output neuron.
        table: roles of the parameters.
    """

    def inputs(info: ParamInfo, x: jax.Array) -> tuple[int, ...]:
        return tuple(range(info.n_stacked, info.n_stacked + info.role.inputs))

    def mean_square(info: ParamInfo, x: jax.Array) -> jax.Array:
        return jnp.square(x).mean(inputs(info, x), keepdims=True)

    def init(params: Tree) -> Tree:
        return table.map(lambda info, x: jnp.zeros_like(mean_square(info, x)), params)

    def divide(info: ParamInfo, x: jax.Array, v: jax.Array) -> jax.Array:
        y = x / (jnp.sqrt(v) + 1e-10)
        matrix = tuple(range(info.n_stacked, x.ndim))
        norms = [jnp.sqrt(jnp.square(z).sum(matrix, keepdims=True)) for z in (x, y)]
        return y * norms[0] / (norms[1] + 1e-10)

    def update(updates: Tree, nu: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        new = table.map(lambda i, x, v: b2 * v + (1 - b2) * mean_square(i, x), updates, nu)
        return table.map(divide, updates, new), new

    return optax.GradientTransformation(init, update)
