"""Learning-rate schedules by name. Step t counts from 0: the first update uses schedule(0).

The functions here give what follows the warm-up and the steps at the peak; their t counts from
there, and `start` is that step.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lm.config.registries import SCHEDULES


def constant(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    return optax.constant_schedule(peak)


def cosine(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, max(end - start, 1), alpha=options.final_ratio)


def linear(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    return optax.linear_schedule(peak, peak * options.final_ratio, max(end - start, 1))


def inverse_sqrt(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """peak · √(start / t): with peak = (d_model · start)^-0.5 the formula of Vaswani 2017, eq. 3,
    and with peak = start^-0.5 and no warm-up that of T5 (Raffel 2020, §3.1.2)."""
    return lambda t: peak * jnp.sqrt(max(start, 1) / (t + start + 1))


def inverse(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """peak / (1 + c t), where c makes it end at `final_ratio` (Bengio et al. 2003, §3.1)."""
    rate = (1 / options.final_ratio - 1) / max(end - start, 1)
    return lambda t: peak / (1 + rate * t)


def step(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """Times `step_factor` after every `step_every` steps."""
    return lambda t: peak * options.step_factor ** jnp.floor_divide(t, options.step_every)


def wsd(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """Warm-up, stable, decay: constant, then linear over the last fraction of the steps."""
    down = round(end * options.wsd_decay_fraction)
    stable = max(end - start - down, 0)
    fall = optax.linear_schedule(peak, peak * options.final_ratio, max(down, 1))
    return optax.join_schedules([optax.constant_schedule(peak), fall], [stable])


def make_schedule(peak: float, options: ConfigDict, train_steps: int) -> optax.Schedule:
    """The learning rate of step t: linear warm-up to `peak`, steps there, then the named decay.

    During the warm-up of w steps the rate is peak · (t + 1) / w, so that no update is lost on a
    rate of 0; `options` is the configuration's section "schedule".
    """
    w = options.warmup_steps
    start = w + options.hold_steps
    after = SCHEDULES[options.name](peak, options, start, options.decay_steps or train_steps)
    if start == 0:
        return after
    warmup = optax.linear_schedule(peak / w, peak, w - 1) if w > 1 else lambda t: peak
    return optax.join_schedules([warmup, optax.constant_schedule(peak), after], [w, start])
