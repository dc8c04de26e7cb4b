"""NorMuon: orthogonal updates, each neuron's divided by its root mean square over the steps.

Li et al. 2025 (arXiv 2510.05491), with the norm of each matrix kept, as in the released code.
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
    """Build the optimizer of matrices whose direction is Muon's, by neuron if the options say so.

    Args:
        direction: Muon without weight decay, at a rate of -1.
        schedule: learning rate of a step.
        options: the configuration's section "optimizer".
        table: roles of the parameters.
    """
    b2 = options.muon.neuron_b2
    neurons = by_neuron(b2, table) if b2 else optax.identity()
    return descend(schedule, options, table, direction, neurons)


def by_neuron(b2: float, table: ParamTable) -> optax.GradientTransformation:
    """Build the transformation of Muon's updates.

    Args:
        b2: decay of the mean square of each output of a matrix.
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
