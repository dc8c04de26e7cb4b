"""Optimizer and learning-rate schedule of a configuration: AdamW, Muon, linear decay.

An optimizer is a function of the schedule, the configuration's section "optimizer" and a
`ParamTable`, which has the role of every parameter (`lm/models/variables.py`): which parameters
decay, which muP scales, and which are matrices for Muon. Most optimizers define an update direction
that `descend` turns into an optimizer. `further_optimizers.py` has more optimizers and schedules.

A decay schedule is a function of the peak rate, the configuration's section "schedule", and the
steps `start` and `end` of the decay. It returns a function of the steps since `start`. Step t
counts from 0: the first update uses schedule(0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import optax
from ml_collections import ConfigDict

from lm.config.registries import OPTIMIZERS, SCHEDULES
from lm.models.variables import KERNELS, Kind, ParamInfo

if TYPE_CHECKING:  # imported at run time only if patterns name parameters
    from lm.models.parameter_groups import TrainableMask

Tree = Any

# Parameter kinds with weight decay, by `optimizer.decay`.
DECAYING = {
    "matrices": KERNELS | {Kind.EMBEDDING, Kind.POSITION_BIAS, Kind.LOW_RANK},
    "kernels": KERNELS | {Kind.LOW_RANK},
    "all": frozenset(Kind),
}


@dataclass(frozen=True)
class ParamTable:
    """Roles of a model's parameters, and settings of how to update them.

    Attributes:
        infos: role and axes of every parameter, by path.
        decay: `optimizer.decay`, a key of `DECAYING`.
        width_ratio: width relative to muP's base model.
    """

    infos: Mapping[str, ParamInfo]
    decay: str = "matrices"
    width_ratio: float = 1.0

    def map(self, function: Callable[..., Any], *trees: Tree) -> Tree:
        """Map `function(info, *leaves)` over trees of (some) parameters."""
        return jax.tree_util.tree_map_with_path(
            lambda path, *x: function(self.infos["/".join(key.key for key in path)], *x), *trees
        )

    def decay_mask(self, params: Tree) -> Tree:
        """Return a mask of parameters with weight decay, for `optax.add_decayed_weights`."""
        return self.map(lambda info, _: info.role.kind in DECAYING[self.decay], params)


def make_optimizer(
    options: ConfigDict,
    schedule: optax.Schedule,
    table: ParamTable,
    trainable: TrainableMask | None = None,
) -> optax.GradientTransformation:
    """Build the configured optimizer, after clipping by the global norm.

    Args:
        options: section "optimizer" of the configuration.
        schedule: learning rate of a step.
        table: roles of the parameters.
        trainable: mask of trainable parameters; frozen layers get zero updates. None: all.

    Returns:
        Transformation of the gradients of trainable parameters; an `averaging.Averaged` if
        parameters are averaged. Layer-wise decay scales the whole update, including decoupled
        weight decay.
    """
    optimizer = OPTIMIZERS[options.name](schedule, options, table)
    if options.moments != "float32":
        from lm.optim.compact_state import compact

        optimizer = compact(optimizer, options.moments)
    if options.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(options.clip_norm), optimizer)
    further = (
        options.layer_decay != 1,
        options.rates,
        options.ema,
        options.name == "schedule_free",
    )
    if any(further) or (trainable is not None and trainable.has_patterns):
        from lm.optim.further_optimizers import scaled_and_averaged

        return scaled_and_averaged(optimizer, schedule, options, table, trainable)
    return optimizer


def descend(
    schedule: optax.Schedule, options: ConfigDict, table: ParamTable, *direction: Any
) -> optax.GradientTransformation:
    """Build an optimizer that steps against a direction, with decoupled weight decay.

    Args:
        schedule: learning rate, which multiplies both.
        options: section "optimizer" of the configuration.
        table: roles of the parameters.
        *direction: chained transformations from gradients to the direction.
    """
    decay = optax.add_decayed_weights(options.weight_decay, table.decay_mask)
    if options.cautious != "none":
        from lm.optim.cautious import cautious

        direction, decay = (cautious(optax.chain(*direction), options, table),), optax.identity()
    return optax.chain(*direction, decay, optax.scale_by_learning_rate(schedule))


def adamw(
    schedule: optax.Schedule, options: ConfigDict, table: ParamTable
) -> optax.GradientTransformation:
    """Build AdamW (Loshchilov and Hutter 2019); decay is multiplied by the learning rate.

    Under muP, the learning rate of hidden matrices is divided by the width ratio (Yang et al. 2022,
    Table 8), but their weight decay is not.
    """
    o = options.adamw
    adam = optax.scale_by_adam(o.b1, o.b2, o.eps)
    if not o.bias_correction:
        from lm.optim.further_optimizers import uncorrected_adam

        adam = uncorrected_adam(o.b1, o.b2, o.eps)
    return descend(schedule, options, table, scale_by_width(adam, table))


def scale_by_width(
    optimizer: optax.GradientTransformation, table: ParamTable
) -> optax.GradientTransformation:
    """Scale hidden-matrix updates of `optimizer` by 1/width ratio: muP's rule for Adam."""

    def update(grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        updates, state = optimizer.update(grads, state, params)
        ratio = table.width_ratio
        scaled = table.map(lambda i, x: x / ratio if i.role.kind == Kind.MATRIX else x, updates)
        return scaled, state

    return optax.GradientTransformation(optimizer.init, update)


def muon(
    schedule: optax.Schedule, options: ConfigDict, table: ParamTable
) -> optax.GradientTransformation:
    """Build Muon (Jordan 2024) for matrices of the layers, and AdamW for everything else.

    AdamW uses its own section of options and `adam_ratio` times the learning rate. The norm of
    Muon's updates does not depend on width, as muP requires; other hidden matrices are scaled by
    the width ratio as in `adamw`.
    """
    o = options.muon
    make = partial(
        optax.contrib.muon,
        ns_steps=o.ns_steps,
        beta=o.beta,
        consistent_rms=o.rms or None,
        weight_decay_mask=table.decay_mask,
        muon_weight_dimension_numbers=partial(table.map, _muon_dimensions),
    )
    matrices = make(schedule, weight_decay=options.weight_decay)
    if o.neuron_b2 or options.cautious != "none":
        from lm.optim.normuon import muon_by_neuron

        matrices = muon_by_neuron(make(-1.0), schedule, options, table)
    others = adamw(lambda t: o.adam_ratio * schedule(t), options, table)
    return optax.partition({"matrix": matrices, "other": others}, partial(table.map, _muon_label))


def _muon_label(info: ParamInfo, leaf: Any) -> str:
    """Return "matrix" for a parameter that Muon orthogonalizes, else "other"."""
    is_matrix = info.role.part == "layers" and info.role.kind in (Kind.MATRIX, Kind.ROUTER)
    return "matrix" if is_matrix else "other"


def _muon_dimensions(info: ParamInfo, leaf: Any) -> optax.contrib.MuonDimensionNumbers:
    """Return the axes of each matrix [inputs…, outputs…] in stacked layers and experts."""
    axes, middle = tuple(range(leaf.ndim)), info.n_stacked + info.role.inputs
    return optax.contrib.MuonDimensionNumbers(axes[info.n_stacked : middle], axes[middle:])


# --- learning-rate schedules


def make_schedule(peak: float, options: ConfigDict, train_steps: int) -> optax.Schedule:
    """Build the schedule: linear warm-up, hold at the peak, then the configured decay.

    During a warm-up of w steps the rate is peak · (t + 1) / w, so the first update is not wasted
    on a rate of 0.

    Args:
        peak: peak learning rate, `optimizer.learning_rate`.
        options: section "schedule" of the configuration.
        train_steps: number of updates; end of the decay unless `decay_steps` is set.
    """
    w = options.warmup_steps
    start = w + options.hold_steps
    after = SCHEDULES[options.name](peak, options, start, options.decay_steps or train_steps)
    if start == 0:
        return after
    warmup = optax.linear_schedule(peak / w, peak, w - 1) if w > 1 else lambda t: peak
    return optax.join_schedules([warmup, optax.constant_schedule(peak), after], [w, start])


def linear(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """Return linear decay to `final_ratio` of the peak."""
    return optax.linear_schedule(peak, peak * options.final_ratio, max(end - start, 1))
