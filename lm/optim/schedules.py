"""Learning-rate schedules, chosen by `schedule.name`: warm-up, steps at the peak, then a decay.

A decay is a function of the peak rate, the configuration's section "schedule", the step `start` at
which the decay starts and the step `end` at which it ends. Its result is a function of the steps
since `start`. Step t counts from 0: the first update uses schedule(0).
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lm.config.registries import SCHEDULES


def constant(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """Return the peak rate for ever."""
    return optax.constant_schedule(peak)


def cosine(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """Return cosine decay to `final_ratio` of the peak (Loshchilov and Hutter 2017)."""
    return optax.cosine_decay_schedule(peak, max(end - start, 1), alpha=options.final_ratio)


def linear(peak: float, options: ConfigDict, start: int, end: int) -> optax.Schedule:
    """Return linear decay to `final_ratio` of the peak."""
    return optax.linear_schedule(peak, peak * options.final_ratio, max(end - start, 1))


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


def make_schedule(peak: float, options: ConfigDict, train_steps: int) -> optax.Schedule:
    """Build the learning-rate schedule: linear warm-up, steps at the peak, then the named decay.

    During the warm-up of w steps the rate is peak · (t + 1) / w, so that no update is lost on a
    rate of 0.

    Args:
        peak: largest learning rate, `optimizer.learning_rate`.
        options: the configuration's section "schedule".
        train_steps: number of updates; the end of the decay, unless `decay_steps` is set.
    """
    w = options.warmup_steps
    start = w + options.hold_steps
    after = SCHEDULES[options.name](peak, options, start, options.decay_steps or train_steps)
    if start == 0:
        return after
    warmup = optax.linear_schedule(peak / w, peak, w - 1) if w > 1 else lambda t: peak
    return optax.join_schedules([warmup, optax.constant_schedule(peak), after], [w, start])
