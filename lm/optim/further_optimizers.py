"""Optimizers beside AdamW and Muon, layer-wise decay, and further decays of the rate.

Adam without bias correction, Adafactor, SGD and Lion; inverse (square root), steps, and WSD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from lm.models.parameter_groups import TrainableMask, along, layer_numbers, stack_of
from lm.models.variables import Kind, ParamInfo, flat, nested

if TYPE_CHECKING:
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


# --- layer-wise decay


def scale_by_layer(
    layer_decay: float, trainable: TrainableMask | None, infos: Mapping[str, ParamInfo]
) -> optax.GradientTransformation:
    """Build the transformation that multiplies updates by `update_scales`."""
    mask = trainable or TrainableMask()
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            jnp.multiply, updates, update_scales(layer_decay, mask, params, infos)
        )
    )


def update_scales(
    layer_decay: float, trainable: TrainableMask, params: Tree, infos: Mapping[str, ParamInfo]
) -> Tree:
    """Return the factor of each parameter's update under layer-wise decay and freezing.

    It is decay^(n - i) for layer i of the n of its stack, decay^(n + 1) for embeddings and what
    normalizes them, 1 for what comes after the layers (BEiT, Bao et al. 2021, in its code; the idea
    is ELECTRA's), and 0 for frozen layers. Embeddings lie below the deepest of their stacks.

    Args:
        layer_decay: the decay, in (0, 1].
        trainable: parameters that train.
        params: those parameters.
        infos: roles of all parameters, by path.

    Returns:
        A tree like `params` of arrays that broadcast to their shapes.
    """
    leaves = flat(params)
    groups = trainable.groups(params, strict=False)
    numbers = {path: layer_numbers(path, leaf) for path, leaf in leaves.items()}
    depths: dict[str, int] = {}  # by stack
    for path, layers in numbers.items():
        if layers is not None:
            depths[stack_of(path)] = max(depths.get(stack_of(path), 0), layers.max() + 1)
    depth = max(depths.values(), default=0)

    def scale(path: str, leaf: Any) -> np.ndarray:
        if (layers := numbers[path]) is not None:
            below = depths[stack_of(path)] - layers
        elif infos[path].role.kind == Kind.EMBEDDING or infos[path].role.part == "input":
            below = np.asarray(depth + 1)
        else:
            below = np.asarray(0)
        return along(np.float32(layer_decay) ** below * groups[path], leaf)

    return nested({path: scale(path, leaf) for path, leaf in leaves.items()})


# --- learning-rate schedules


def inverse_sqrt(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """Return peak · √(start / t), t counted from the first step.

    With peak = (d_model · start)^-0.5 it is the formula of Vaswani et al. 2017, eq. 3, and with
    peak = start^-0.5 and no warm-up that of T5 (Raffel et al. 2020, §3.1.2).
    """
    return lambda t: peak * jnp.sqrt(max(start, 1) / (t + start + 1))


def inverse(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """Return peak / (1 + c t) with c such that it ends at `final_ratio` (Bengio 2003, §3.1)."""
    rate = (1 / options.final_ratio - 1) / max(end - start, 1)
    return lambda t: peak / (1 + rate * t)


def step(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """Return a staircase: multiplied by `step_factor` after every `step_every` steps."""
    return lambda t: peak * options.step_factor ** jnp.floor_divide(t, options.step_every)


def wsd(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """Return warm-up, stable, decay: constant, then linear over the last fraction of the steps."""
    down = round(end * options.wsd_decay_fraction)
    stable = max(end - start - down, 0)
    fall = optax.linear_schedule(peak, peak * options.final_ratio, max(down, 1))
    return optax.join_schedules([optax.constant_schedule(peak), fall], [stable])
