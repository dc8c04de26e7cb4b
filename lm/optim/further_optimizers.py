"""Optimizers beside AdamW and Muon: Adam without bias correction, Adafactor, SGD and Lion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lm.optim.optimizers import ParamTable

Tree = Any


def uncorrected_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Build Adam without bias correction (Devlin et al. 2018, released code)."""

    def update(grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment(grads, state.nu, b2, 2)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, state._replace(count=state.count + 1, mu=mu, nu=nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def adafactor(
    schedule: optax.Schedule, options: ConfigDict, table: ParamTable
) -> optax.GradientTransformation:
    """Build Adafactor without momentum (Shazeer and Stern 2018), with decoupled weight decay.

    Every layer of a scanned stack is a parameter of its own.
    """
    o = options.adafactor
    one = optax.adafactor(
        learning_rate=None,
        min_dim_size_to_factor=o.min_dim,
        decay_rate=o.decay_rate,
        multiply_by_parameter_scale=o.parameter_scale,
        clipping_threshold=o.clip_threshold,
    )
    stacked = optax.GradientTransformation(_vmap_layers(one.init), _vmap_layers(one.update))
    return optax.chain(
        optax.partition(
            {"stacked": stacked, "single": one},
            lambda params: table.map(
                lambda info, _: "stacked" if info.axes[:1] == ("layers",) else "single", params
            ),
        ),
        # optax.adafactor already points downhill: turn round for the shared tail.
        optax.scale(-1.0),
        optax.add_decayed_weights(options.weight_decay, table.decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def _vmap_layers(function: Callable) -> Callable:
    """Return `function` mapped over stacked layers; an empty tree is passed as it is."""
    return lambda *args: (jax.vmap(function) if jax.tree.leaves(args[0]) else function)(*args)


def sgd(
    schedule: optax.Schedule, options: ConfigDict, table: ParamTable
) -> optax.GradientTransformation:
    """Build stochastic gradient descent with momentum and decoupled weight decay."""
    return optax.chain(
        optax.trace(options.sgd.momentum, options.sgd.nesterov),
        optax.add_decayed_weights(options.weight_decay, table.decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def lion(
    schedule: optax.Schedule, options: ConfigDict, table: ParamTable
) -> optax.GradientTransformation:
    """Build Lion (Chen et al. 2023)."""
    o, decay = options.lion, options.weight_decay
    return optax.lion(schedule, o.b1, o.b2, weight_decay=decay, mask=table.decay_mask)
