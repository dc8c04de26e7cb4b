"""Diagnosis of training that cannot make progress: zero rate, no targets, non-finite values."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import jax
import jax.numpy as jnp

from lm.data.batches import Batches, prefetch
from lm.data.dataset import Store
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.variables import Params, flat

_LOOK_AHEAD = 100  # batches


def likely_mistakes(experiment: Experiment, stores: Sequence[Store]) -> Iterator[str]:
    """Yield a warning for each setting of a valid run that is probably a mistake.

    Args:
        experiment: experiment of the run.
        stores: its training data.
    """
    config, rate = experiment.config, experiment.steps.schedule
    steps, size = config.train.steps, config.data.batch_size
    # Step t, from 0, uses rate(t); the rate does not rise in the last steps.
    first = bisect_left(range(steps), True, key=lambda t: not rate(t)) if not rate(steps - 1) else 0
    if 0 < first < steps:
        yield (
            f"the learning rate is 0 from step {first + 1} to the last, {steps}, which learn "
            "nothing: look at --config.schedule.decay_steps and --config.schedule.final_ratio"
        )
    if config.data.order == "contiguous":
        return
    n_rows = sum(len(experiment.objective.examples(s, training=True)) for s in stores)
    if n_rows < size:
        yield (
            f"the training data are {n_rows} row(s), fewer than --config.data.batch_size={size}: "
            "each batch repeats some of them"
        )


def require_learning(
    values: Mapping[str, float], experiment: Experiment, params: Params, batches: Batches
) -> None:
    """Raise UserError if the first step had no learning rate, or if no batch has a gradient.

    Args:
        values: metrics of the first step.
        experiment: experiment of the run.
        params: parameters of the run.
        batches: training batches.
    """
    if not values["learning_rate"]:
        raise UserError(
            "the learning rate of the first step is 0, so nothing would be learned: set "
            "--config.optimizer.learning_rate above; lm eval measures without training"
        )
    if values["target_tokens"]:
        raise UserError(
            "the gradient of the first step is 0, so nothing would be learned: look for zeros "
            "that multiply the model (--config.model.init_std, softcap or scale keys, "
            "--config.lora.alpha), a single class, or frozen parameters"
        )
    carry = experiment.init_carry(batches.batch_size)
    first = [[i] for i in range(_LOOK_AHEAD)]
    with closing(prefetch(batches, first, experiment.batch_sharding)) as arrays:
        for batch in arrays:
            carry, sums = experiment.eval_steps(params, carry, batch)
            if sums.weight.sum() > 0:
                return
    raise UserError(
        f"the first {_LOOK_AHEAD} batches have no targets, so nothing would be learned: possible "
        "causes are documents of one token under --config.data.isolate_documents, prompts "
        "that fill --config.data.sequence_length, or words that --config.objective.subsample drops"
    )


def nonfinite_message(
    step: int, values: Mapping[str, float], params: Params, weight_decay: float, saved_at: int
) -> str:
    """Return an error message that says which values are not finite and what to do.

    Args:
        step: first step that was skipped.
        values: metrics of that step.
        params: parameters of the run.
        weight_decay: `optimizer.weight_decay`.
        saved_at: step of the saved state.
    """
    bad = [path for path, x in flat(params).items() if not _is_finite(x)]
    what = "gradient" if jnp.isfinite(values["loss"]) else "loss"
    rate, skip = values["learning_rate"], "continue with --config.train.nonfinite=skip"
    if bad:
        when = "before the first step" if step == 1 else f"since a step before {step}"
        advice = (
            f"{len(bad)} parameters, such as {bad[0]}, are not finite {when}: "
            + ("look at --config.init and --config.model.init" if step == 1 else "no step can mend")
            + ("" if step == 1 else " that; look at --config.optimizer, and start again")
        )
    elif step == 1:
        advice = (
            f"No parameter had changed yet, so the learning rate is not the cause: look at the "
            f"data, at large loss weights (--config.objective, --config.model), or {skip}"
        )
    elif rate * weight_decay > 1:
        product = f"--config.optimizer.weight_decay={weight_decay} times the rate {rate:.3g}"
        advice = f"{product} is above 1, so parameters grow: lower it"
    elif rate == 0:
        advice = f"The learning rate is 0, so the cause is in the data: {skip}"
    else:
        advice = f"Lower the learning rate, or {skip}"
    return (
        f"{what} is not finite at step {step}; that update was skipped and the state saved at "
        f"step {saved_at}. {advice}"
    )


def _is_finite(array: jax.Array) -> bool:
    return bool(jnp.isfinite(array).all())
