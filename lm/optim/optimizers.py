"""Optimizers by name, each from its own section of the configuration.

A parameter is described by its path ("stack/layers/attention/query/kernel") and the logical names
of its axes; which parameters decay, and which are matrices to Muon, follows from these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, muon

Tree = Any


def leaf_name(path: tuple) -> str:
    """The last component of a parameter's path: kernel, bias, scale or embedding."""
    return str(path[-1].key)


def decay_mask(what: str) -> Callable[[Tree], Tree]:
    """Which parameters decay; never biases and norms unless `what` is "all"."""
    decaying = {
        "matrices": ("kernel", "embedding"),
        "kernels": ("kernel",),
        "all": ("kernel", "embedding", "bias", "scale"),
    }[what]
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: leaf_name(path) in decaying, params
    )


def adamw(schedule: optax.Schedule, options: ConfigDict, mask: Any) -> Any:
    """AdamW (Loshchilov and Hutter 2019); decay is multiplied by the learning rate."""
    o = options.adamw
    return optax.adamw(schedule, o.b1, o.b2, o.eps, weight_decay=options.weight_decay, mask=mask)


def adafactor(schedule: optax.Schedule, options: ConfigDict, mask: Any) -> Any:
    """Adafactor without momentum (Shazeer and Stern 2018); decay as in AdamW."""
    o = options.adafactor
    return optax.chain(
        optax.adafactor(
            learning_rate=None,
            min_dim_size_to_factor=o.min_dim,
            decay_rate=o.decay_rate,
            multiply_by_parameter_scale=o.parameter_scale,
            clipping_threshold=o.clip_threshold,
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


def muon_optimizer(schedule: optax.Schedule, options: ConfigDict, mask: Any) -> Any:
    """Muon (Jordan 2024) for the kernels of the blocks, Adam for everything else."""
    o = options.muon
    return muon(
        schedule,
        ns_steps=o.ns_steps,
        beta=o.beta,
        weight_decay=options.weight_decay,
        weight_decay_mask=mask,
        adam_learning_rate=lambda t: o.adam_ratio * schedule(t),
        muon_weight_dimension_numbers=_muon_matrices,
        consistent_rms=None,
    )


def _muon_matrices(params: Tree) -> Tree:
    """How each stacked kernel is a matrix: layers apart, inputs against outputs."""

    def matrix(path: tuple, leaf: Any) -> MuonDimensionNumbers | None:
        keys = [str(part.key) for part in path]
        if keys[-1] != "kernel" or "layers" not in keys:
            return None
        # [layers, inputs…, outputs…]; only attention's "out" has two input dimensions.
        n_inputs = 2 if leaf.ndim == 4 and keys[-2] == "out" else 1
        return MuonDimensionNumbers(
            tuple(range(1, 1 + n_inputs)), tuple(range(1 + n_inputs, leaf.ndim))
        )

    return jax.tree_util.tree_map_with_path(matrix, params)


OPTIMIZERS: dict[str, Callable[[optax.Schedule, ConfigDict, Any], Any]] = {
    "adamw": adamw,
    "adafactor": adafactor,
    "sgd": sgd,
    "lion": lion,
    "muon": muon_optimizer,
}


def make_optimizer(options: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping by the global norm, then the named optimizer with decoupled weight decay.

    `options` is the configuration's section "optimizer".
    """
    optimizer = OPTIMIZERS[options.name](schedule, options, decay_mask(options.decay))
    if options.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(options.clip_norm), optimizer)
    return optimizer
