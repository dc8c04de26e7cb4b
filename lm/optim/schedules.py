"""Learning-rate schedules by name. Step t counts from 0: the first update uses schedule(0)."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def constant(peak: float, options: ConfigDict, decay_steps: int) -> optax.Schedule:
    return optax.constant_schedule(peak)


def cosine(peak: float, options: ConfigDict, decay_steps: int) -> optax.Schedule:
    steps = max(decay_steps - options.warmup_steps, 1)
    return optax.cosine_decay_schedule(peak, steps, alpha=options.final_ratio)


def linear(peak: float, options: ConfigDict, decay_steps: int) -> optax.Schedule:
    steps = max(decay_steps - options.warmup_steps, 1)
    return optax.linear_schedule(peak, peak * options.final_ratio, steps)


def inverse_sqrt(peak: float, options: ConfigDict, decay_steps: int) -> optax.Schedule:
    """peak · sqrt(w / t): with peak = (d_model · w)^-0.5 the formula of Vaswani 2017, eq. 3."""
    w = options.warmup_steps
    return lambda t: peak * jnp.sqrt(max(w, 1) / (t + w + 1))  # t counts from the warm-up's end


def wsd(peak: float, options: ConfigDict, decay_steps: int) -> optax.Schedule:
    """Warm-up, stable, decay: constant, then linear over the last fraction of the steps."""
    down = round(decay_steps * options.wsd_decay_fraction)
    stable = max(decay_steps - options.warmup_steps - down, 0)
    fall = optax.linear_schedule(peak, peak * options.final_ratio, max(down, 1))
    return optax.join_schedules([optax.constant_schedule(peak), fall], [stable])


SCHEDULES = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "inverse_sqrt": inverse_sqrt,
    "wsd": wsd,
}


def make_schedule(peak: float, options: ConfigDict, train_steps: int) -> optax.Schedule:
    """The learning rate of step t: linear warm-up to `peak`, then the named decay.

    During the warm-up of w steps the rate is peak · (t + 1) / w, so that no update is lost on a
    rate of 0; `options` is the configuration's section "schedule".
    """
    after = SCHEDULES[options.name](peak, options, options.decay_steps or train_steps)
    w = options.warmup_steps
    if w == 0:
        return after
    warmup = optax.linear_schedule(peak / w, peak, w - 1) if w > 1 else lambda t: peak
    return optax.join_schedules([warmup, after], [w])
