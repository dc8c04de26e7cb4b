"""Optimizers by name, each from its own section of the configuration.

Which parameters decay, which are matrices to Muon, and which are stacks of layers follows from
their paths ("stack/layers/attention/query/kernel").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lm.config.registries import OPTIMIZERS
from lm.optim.parameter_groups import (
    EVERYTHING,
    TrainableMask,
    by_path,
    is_of_layer,
    is_stacked,
    update_scales,
)

Tree = Any


def decay_mask(what: str) -> Callable[[Tree], Tree]:
    """Which parameters decay; never biases and norms unless `what` is "all"."""
    decaying = {
        "matrices": ("kernel", "embedding", "a", "b"),  # a and b of low-rank adaptation
        "kernels": ("kernel", "a", "b"),
        "all": ("kernel", "embedding", "a", "b", "bias", "scale"),
    }[what]
    return lambda params: by_path(params, lambda names, _: names[-1] in decaying)


def adamw(
    schedule: optax.Schedule, options: ConfigDict, mask: Any, width_ratio: float = 1.0
) -> Any:
    """AdamW (Loshchilov and Hutter 2019); decay is multiplied by the learning rate.

    muP's rate of hidden kernels is 1/`width_ratio` of it (Yang et al. 2022, Table 8), their decay
    that of all.
    """
    o = options.adamw
    adam = optax.scale_by_adam if o.bias_correction else uncorrected_adam
    return optax.chain(
        over_width(adam(o.b1, o.b2, o.eps), width_ratio),
        optax.add_decayed_weights(options.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )


def uncorrected_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam whose moments stay small in the first steps (Devlin et al. 2018, released code)."""

    def update(grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment(grads, state.nu, b2, 2)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, state._replace(count=state.count + 1, mu=mu, nu=nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def over_width(
    direction: optax.GradientTransformation, width_ratio: float
) -> optax.GradientTransformation:
    """The directions of hidden kernels, those to a fixed number of scores being none, divided."""

    def update(grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        found, state = direction.update(grads, state, params)
        return by_path(found, lambda names, x: x / width_ratio if _is_hidden(names) else x), state

    return optax.GradientTransformation(direction.init, update)


def adafactor(schedule: optax.Schedule, options: ConfigDict, mask: Any) -> Any:
    """Adafactor without momentum (Shazeer and Stern 2018), each layer's parameter by itself; decay
    as in AdamW."""
    o = options.adafactor
    each = optax.adafactor(
        learning_rate=None,
        min_dim_size_to_factor=o.min_dim,
        decay_rate=o.decay_rate,
        multiply_by_parameter_scale=o.parameter_scale,
        clipping_threshold=o.clip_threshold,
    )
    stacked = optax.GradientTransformation(_each_layer(each.init), _each_layer(each.update))
    return optax.chain(
        optax.partition(
            {"stacked": stacked, "single": each},
            lambda params: by_path(
                params, lambda names, _: "stacked" if is_stacked("/".join(names)) else "single"
            ),
        ),
        # optax.adafactor already points downhill: turn round for the shared tail.
        optax.scale(-1.0),
        optax.add_decayed_weights(options.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )


def sgd(schedule: optax.Schedule, options: ConfigDict, mask: Any) -> Any:
    """Stochastic gradient descent with momentum; decay is decoupled."""
    return optax.chain(
        optax.trace(options.sgd.momentum, options.sgd.nesterov),
        optax.add_decayed_weights(options.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )


def lion(schedule: optax.Schedule, options: ConfigDict, mask: Any) -> Any:
    """Lion (Chen et al. 2023)."""
    o = options.lion
    return optax.lion(schedule, o.b1, o.b2, weight_decay=options.weight_decay, mask=mask)


def muon(schedule: optax.Schedule, options: ConfigDict, mask: Any, width_ratio: float = 1.0) -> Any:
    """Muon (Jordan 2024) for the kernels of the blocks; AdamW, with its own section's options and
    `adam_ratio` of the learning rate, for everything else.

    The norm of its updates does not depend on the width, which is what muP asks of them; the
    other kernels follow `width_ratio` as in AdamW.
    """
    o = options.muon
    matrices = optax.contrib.muon(
        schedule,
        ns_steps=o.ns_steps,
        beta=o.beta,
        weight_decay=options.weight_decay,
        weight_decay_mask=mask,
        muon_weight_dimension_numbers=_dimensions,
    )
    others = adamw(lambda t: o.adam_ratio * schedule(t), options, mask, width_ratio)
    return optax.partition(
        {"matrix": matrices, "other": others},
        lambda params: by_path(
            params, lambda names, _: "matrix" if _is_block_kernel(names) else "other"
        ),
    )


def _each_layer(function: Callable) -> Callable:
    """`function` of each layer of stacked parameters; of a model without layers, of nothing."""
    return lambda *args: (jax.vmap(function) if jax.tree.leaves(args[0]) else function)(*args)


SCORES = {"head", "router", "classifier", "sentence_head", "span_head"}


def _is_hidden(names: list[str]) -> bool:
    """Whether both sides of a parameter grow with the width of the model."""
    return names[-1] == "kernel" and not SCORES & set(names)


def _is_block_kernel(names: list[str]) -> bool:
    return names[-1] == "kernel" and is_of_layer("/".join(names))


def _dimensions(kernels: Tree) -> Tree:
    """How each stacked kernel [layers, inputs…, outputs…] is a matrix, layers apart; those of
    experts [layers, experts, inputs, outputs] are matrices each."""

    def matrix(names: list[str], leaf: Any) -> optax.contrib.MuonDimensionNumbers:
        first = is_stacked("/".join(names)) + ("experts" in names)  # after layers, and experts
        # Only attention's output projection [layers, heads, head_dim, embed] has two inputs.
        n_inputs = 2 if names[-2:] == ["out", "kernel"] and leaf.ndim - first == 3 else 1
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(first, first + n_inputs)), tuple(range(first + n_inputs, leaf.ndim))
        )

    return by_path(kernels, matrix)


def make_optimizer(
    options: ConfigDict,
    schedule: optax.Schedule,
    trainable: TrainableMask = EVERYTHING,
    width_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """Clipping by the global norm, then the named optimizer with decoupled weight decay.

    It is given the parameters that train. Layer-wise decay scales the whole update, weight decay
    included; frozen layers stay as they are. `options` is the configuration's section "optimizer".
    A `width_ratio` over muP's base model other than 1 is for adamw and muon.
    """
    make = OPTIMIZERS[options.name]
    muP = {} if width_ratio == 1 else {"width_ratio": width_ratio}
    optimizer = make(schedule, options, decay_mask(options.decay), **muP)
    if options.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(options.clip_norm), optimizer)
    if options.layer_decay != 1 or trainable != EVERYTHING:
        optimizer = optax.chain(optimizer, _scale_by_layer(options.layer_decay, trainable))
    return optimizer


def _scale_by_layer(layer_decay: float, trainable: TrainableMask) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            jnp.multiply, updates, update_scales(layer_decay, trainable, params)
        )
    )
