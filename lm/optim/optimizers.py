"""Optimizers, chosen by `optimizer.name`, each with options in a section of its own.

An optimizer is a function of the schedule, the configuration's section "optimizer" and a
`ParamTable`, which knows the role of every parameter (`lm/models/variables.py`): what decays, what
muP scales, which arrays are matrices to Muon.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lm.config.registries import OPTIMIZERS
from lm.models.variables import KERNELS, Kind, ParamInfo
from lm.optim.parameter_groups import EVERYTHING, TrainableMask, update_scales

Tree = Any

# Kinds of parameters that decay, by `optimizer.decay`.
DECAYING = {
    "matrices": KERNELS | {Kind.EMBEDDING, Kind.POSITION_BIAS, Kind.LOW_RANK},
    "kernels": KERNELS | {Kind.LOW_RANK},
    "all": frozenset(Kind),
}


@dataclass(frozen=True)
class ParamTable:
    """Roles of a model's parameters, and how they are to be treated.

    Attributes:
        infos: role and axes of every parameter, by path.
        decay: `optimizer.decay`, a key of `DECAYING`.
        width_ratio: width over that of muP's base model.
    """

    infos: Mapping[str, ParamInfo]
    decay: str = "matrices"
    width_ratio: float = 1.0

    def map(self, function: Callable[[ParamInfo, Any], Any], tree: Tree) -> Tree:
        """Return `function(info, leaf)` for every leaf of a tree of (some of the) parameters."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: function(self.infos["/".join(key.key for key in path)], leaf), tree
        )

    def decay_mask(self, params: Tree) -> Tree:
        """Return True for parameters that decay; the mask of `optax.add_decayed_weights`."""
        return self.map(lambda info, _: info.role.kind in DECAYING[self.decay], params)


def make_optimizer(
    options: ConfigDict,
    schedule: optax.Schedule,
    table: ParamTable,
    trainable: TrainableMask = EVERYTHING,
) -> optax.GradientTransformation:
    """Build the named optimizer, after clipping by the global norm.

    Args:
        options: the configuration's section "optimizer".
        schedule: learning rate of a step.
        table: roles of the parameters.
        trainable: parameters that train; frozen layers stay as they are.

    Returns:
        A transformation of the gradients of the parameters that train. Layer-wise decay scales the
        whole update, decoupled weight decay included.
    """
    optimizer = OPTIMIZERS[options.name](schedule, options, table)
    if options.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(options.clip_norm), optimizer)
    if options.layer_decay != 1 or trainable != EVERYTHING:
        scale = _scale_by_layer(options.layer_decay, trainable, table.infos)
        optimizer = optax.chain(optimizer, scale)
    return optimizer


def adamw(
    schedule: optax.Schedule, options: ConfigDict, table: ParamTable
) -> optax.GradientTransformation:
    """Build AdamW (Loshchilov and Hutter 2019); decay is multiplied by the learning rate.

    Under muP the learning rate of hidden matrices is divided by the width ratio (Yang et al. 2022,
    Table 8), their decay is not.
    """
    o = options.adamw
    adam = optax.scale_by_adam if o.bias_correction else uncorrected_adam
    return optax.chain(
        scale_by_width(adam(o.b1, o.b2, o.eps), table),
        optax.add_decayed_weights(options.weight_decay, table.decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def uncorrected_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Build Adam without bias correction (Devlin et al. 2018, released code)."""

    def update(grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment(grads, state.nu, b2, 2)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, state._replace(count=state.count + 1, mu=mu, nu=nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def scale_by_width(
    optimizer: optax.GradientTransformation, table: ParamTable
) -> optax.GradientTransformation:
    """Scale hidden-matrix updates of `optimizer` by 1/width ratio, which is muP's rule for Adam."""

    def update(grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        updates, state = optimizer.update(grads, state, params)
        ratio = table.width_ratio
        scaled = table.map(lambda i, x: x / ratio if i.role.kind == Kind.MATRIX else x, updates)
        return scaled, state

    return optax.GradientTransformation(optimizer.init, update)


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


def muon(
    schedule: optax.Schedule, options: ConfigDict, table: ParamTable
) -> optax.GradientTransformation:
    """Build Muon (Jordan 2024) for the matrices of the layers, and AdamW for everything else.

    AdamW has the options of its own section and `adam_ratio` of the learning rate. The norm of
    Muon's updates does not depend on the width, as muP asks; other hidden matrices follow the width
    ratio as in `adamw`.
    """
    o = options.muon
    matrices = optax.contrib.muon(
        schedule,
        ns_steps=o.ns_steps,
        beta=o.beta,
        weight_decay=options.weight_decay,
        weight_decay_mask=table.decay_mask,
        muon_weight_dimension_numbers=lambda params: table.map(_muon_dimensions, params),
    )
    others = adamw(lambda t: o.adam_ratio * schedule(t), options, table)
    return optax.partition(
        {"matrix": matrices, "other": others},
        lambda params: table.map(
            lambda info, _: "matrix" if is_muon_matrix(info) else "other", params
        ),
    )


def is_muon_matrix(info: ParamInfo) -> bool:
    """Return whether Muon orthogonalizes the updates of a parameter."""
    return info.role.part == "layers" and info.role.kind in (Kind.MATRIX, Kind.ROUTER)


def _muon_dimensions(info: ParamInfo, leaf: Any) -> optax.contrib.MuonDimensionNumbers:
    """Return the axes of each matrix [inputs…, outputs…] of a stack of layers and experts."""
    first = info.n_stacked
    middle = first + info.role.inputs
    return optax.contrib.MuonDimensionNumbers(
        tuple(range(first, middle)), tuple(range(middle, leaf.ndim))
    )


def _vmap_layers(function: Callable) -> Callable:
    """Return `function` mapped over stacked layers; an empty tree is passed as it is."""
    return lambda *args: (jax.vmap(function) if jax.tree.leaves(args[0]) else function)(*args)


def _scale_by_layer(
    layer_decay: float, trainable: TrainableMask, infos: Mapping[str, ParamInfo]
) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            jnp.multiply, updates, update_scales(layer_decay, trainable, params, infos)
        )
    )
