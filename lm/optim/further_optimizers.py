"""Optimizers besides AdamW and Muon, per-layer learning rates, and further schedules.

Adam without bias correction, Adafactor, SGD, Lion, AdEMAMix and schedule-free AdamW; inverse
(square root), step, and WSD schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from lm.config.patterns import rate_rules
from lm.config.registry import listing
from lm.models.parameter_groups import TrainableMask, along, layer_numbers, matching, stack_of
from lm.models.variables import Kind, ParamInfo, flat, nested
from lm.optim.optimizers import descend, scale_by_width

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

    Every layer of a scanned stack is treated as a separate parameter.
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
    by_layer = optax.partition(
        {"stacked": stacked, "single": one},
        lambda params: table.map(
            lambda info, _: "stacked" if info.axes[:1] == ("layers",) else "single", params
        ),
    )
    # optax.adafactor already negates; undo that for `descend`.
    return descend(schedule, options, table, by_layer, optax.scale(-1.0))


def _vmap_layers(function: Callable) -> Callable:
    """Map `function` over stacked layers; empty trees are passed through."""
    return lambda *args: (jax.vmap(function) if jax.tree.leaves(args[0]) else function)(*args)


def sgd(
    schedule: optax.Schedule, options: ConfigDict, table: ParamTable
) -> optax.GradientTransformation:
    """Build stochastic gradient descent with momentum and decoupled weight decay."""
    return descend(
        schedule, options, table, optax.trace(options.sgd.momentum, options.sgd.nesterov)
    )


def lion(
    schedule: optax.Schedule, options: ConfigDict, table: ParamTable
) -> optax.GradientTransformation:
    """Build Lion (Chen et al. 2023)."""
    o = options.lion
    return descend(schedule, options, table, optax.scale_by_lion(o.b1, o.b2))


def ademamix(
    schedule: optax.Schedule, options: ConfigDict, table: ParamTable
) -> optax.GradientTransformation:
    """Build AdEMAMix (Pagliardini et al. 2024, Algorithm 1, and its schedules of alpha and b3)."""
    o = options.ademamix

    def warmed(t: jax.Array) -> jax.Array:
        """Fraction of the warm-up completed at step t, counted from 0."""
        return jnp.minimum((t + 1) / max(o.rise_steps, 1), 1)

    def b3(t: jax.Array) -> jax.Array:
        # From b1 to b3, with a linearly growing half-life of the average.
        first, last = math.log(o.b1), math.log(o.b3)
        return jnp.exp(first * last / ((1 - warmed(t)) * last + warmed(t) * first))

    adam = optax.contrib.scale_by_ademamix(o.b1, o.b2, b3, lambda t: o.alpha * warmed(t), o.eps)
    return descend(schedule, options, table, scale_by_width(adam, table))


def schedule_free(
    schedule: optax.Schedule, options: ConfigDict, table: ParamTable
) -> optax.GradientTransformation:
    """Build the steps of schedule-free AdamW (Defazio et al. 2024); see `averaging`."""
    o = options.schedule_free
    adam = optax.scale_by_rms(o.b2, o.eps, eps_in_sqrt=False, bias_correction=True)
    return descend(schedule, options, table, scale_by_width(adam, table))


# --- per-layer learning rates


def scaled_and_averaged(
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    options: ConfigDict,
    table: ParamTable,
    trainable: TrainableMask | None,
) -> optax.GradientTransformation:
    """Scale an optimizer's updates by `update_scales`, and average its parameters if configured.

    Args:
        optimizer: the optimizer.
        schedule: learning rate of a step.
        options: section "optimizer" of the configuration.
        table: roles of the parameters.
        trainable: parameters that train; None for all.
    """
    has_patterns = trainable is not None and trainable.has_patterns
    if options.layer_decay != 1 or options.rates or has_patterns:
        optimizer = optax.chain(optimizer, scale_by_layer(options, trainable, table.infos))
    if options.ema or options.name == "schedule_free":
        from lm.optim.averaging import averaged

        return averaged(optimizer, schedule, options)
    return optimizer


def scale_by_layer(
    options: ConfigDict, trainable: TrainableMask | None, infos: Mapping[str, ParamInfo]
) -> optax.GradientTransformation:
    """Build the transformation that multiplies updates by `update_scales`."""
    mask = trainable or TrainableMask()

    def scales(params: Tree) -> Tree:
        return update_scales(options.layer_decay, mask, params, infos, options.rates)

    def init(params: Tree) -> optax.EmptyState:
        scales(params)  # raise UserErrors before the first step
        return optax.EmptyState()

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        return jax.tree.map(jnp.multiply, updates, scales(params)), state

    return optax.GradientTransformation(init, update)


def update_scales(
    layer_decay: float,
    trainable: TrainableMask,
    params: Tree,
    infos: Mapping[str, ParamInfo],
    rates: str = "",
) -> Tree:
    """Return the update factor of each parameter from rates, layer-wise decay and freezing.

    Layer-wise decay multiplies layer i of n by decay^(n - i), embeddings and their norms by
    decay^(n + 1), and everything after the layers by 1 (released code of BEiT, Bao et al. 2021,
    following ELECTRA). Embeddings shared by several stacks use the deepest one. Frozen layers have
    factor 0.

    Args:
        layer_decay: decay in (0, 1].
        trainable: mask of trainable parameters.
        params: trainable parameters.
        infos: roles of all parameters, by path.
        rates: `--config.optimizer.rates`; the factors of all matching patterns are multiplied.

    Returns:
        Tree like `params` of arrays that broadcast to their shapes.

    Raises:
        UserError: a pattern of `rates` matches no path.
    """
    leaves = flat(params)
    groups = trainable.groups(params, strict=False)
    numbers = {path: layer_numbers(path, leaf) for path, leaf in leaves.items()}
    depths: dict[str, int] = {}  # number of layers by stack
    for path, layers in numbers.items():
        if layers is not None:
            depths[stack_of(path)] = max(depths.get(stack_of(path), 0), layers.max() + 1)
    depth = max(depths.values(), default=0)
    factors = {path: group.astype(np.float32) for path, group in groups.items()}
    for pattern, factor in rate_rules(rates):
        found = matching("optimizer.rates", listing([pattern]), leaves)
        factors = {
            path: f * np.where(found[path], np.float32(factor), 1) for path, f in factors.items()
        }

    def scale(path: str, leaf: Any) -> np.ndarray:
        if (layers := numbers[path]) is not None:
            below = depths[stack_of(path)] - layers
        elif infos[path].role.kind == Kind.EMBEDDING or infos[path].role.part == "input":
            below = np.asarray(depth + 1)
        else:
            below = np.asarray(0)
        return along(np.float32(layer_decay) ** below * factors[path], leaf)

    return nested({path: scale(path, leaf) for path, leaf in leaves.items()})


# --- learning-rate schedules


def constant(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """Return a constant schedule at the peak rate."""
    return optax.constant_schedule(peak)


def cosine(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """Return cosine decay to `final_ratio` of the peak (Loshchilov and Hutter 2017)."""
    return optax.cosine_decay_schedule(peak, max(end - start, 1), alpha=options.final_ratio)


def inverse_sqrt(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """Return peak · √(start / t), t counted from the first step.

    With peak = (d_model · start)^-0.5 this is eq. 3 of Vaswani et al. 2017; with peak = start^-0.5
    and no warm-up, the schedule of T5 (Raffel et al. 2020, §3.1.2).
    """
    return lambda t: peak * jnp.sqrt(max(start, 1) / (t + start + 1))


def inverse(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """Return peak / (1 + c t), with c such that it ends at `final_ratio` (Bengio 2003, §3.1)."""
    rate = (1 / options.final_ratio - 1) / max(end - start, 1)
    return lambda t: peak / (1 + rate * t)


def step(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """Return step decay: multiply by `step_factor` after every `step_every` steps."""
    return lambda t: peak * options.step_factor ** jnp.floor_divide(t, options.step_every)


def wsd(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """Return warmup–stable–decay: constant, then linear over the last fraction of steps."""
    down = round(end * options.wsd_decay_fraction)
    stable = max(end - start - down, 0)
    fall = optax.linear_schedule(peak, peak * options.final_ratio, max(down, 1))
    return optax.join_schedules([optax.constant_schedule(peak), fall], [stable])
