"""Causes of training that cannot go on: values that are not finite, and nothing to learn."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lm.data.batches import Batches, prefetch
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.variables import Params, flat

_LOOK_AHEAD = 100  # batches


def require_learning(
    values: Mapping[str, float], experiment: Experiment, params: Params, batches: Batches
) -> None:
    """Raise UserError if the first step had no rate, or no gradient and later ones have none.

    Args:
        values: metrics of the step.
        experiment: experiment of the run.
        params: its parameters.
        batches: batches of the run.
    """
    if not values["learning_rate"]:
        raise UserError(
            "the learning rate of the first step is 0, so that nothing would be learned: set "
            "--config.optimizer.learning_rate above; lm eval measures without training"
        )
    if values["target_tokens"]:
        raise UserError(
            "the gradient of the first step is 0, so that nothing would be learned: look for zeros "
            "that multiply the model (--config.model.init_std, softcap or scale keys, "
            "--config.lora.alpha), a single class, or frozen parameters"
        )
    carry = experiment.init_carry(batches.batch_size)
    for batch in prefetch(batches, [[i] for i in range(_LOOK_AHEAD)], experiment.batch_sharding):
        carry, sums = experiment.eval_steps(params, carry, batch)
        if sums.weight.sum() > 0:
            return
    raise UserError(
        f"the first {_LOOK_AHEAD} batches hold no target, so that nothing would be learned: no "
        "token of the data is to be predicted (documents of one token under "
        "--config.data.isolate_documents, prompts that fill --config.data.sequence_length, words "
        "that --config.objective.subsample drops)"
    )


def nonfinite_message(
    step: int, values: Mapping[str, float], params: Params, weight_decay: float, saved_at: int
) -> str:
    """Return what was not finite and what to do about it.

    Args:
        step: number of the first step that was left out.
        values: its metrics.
        params: parameters of the run.
        weight_decay: `optimizer.weight_decay`.
        saved_at: step whose state was saved.
    """
    bad = [path for path, x in flat(params).items() if not _is_finite(x)]
    what = "gradient" if jnp.isfinite(values["loss"]) else "loss"
    rate, go_on = values["learning_rate"], "continue with --config.train.nonfinite=skip"
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
            f"data, at large weights of losses (--config.objective, --config.model) or {go_on}"
        )
    elif rate * weight_decay > 1:
        product = f"--config.optimizer.weight_decay={weight_decay} times the rate {rate:.3g}"
        advice = f"{product} is above 1, so that parameters grow: lower it"
    elif rate == 0:
        advice = f"The learning rate is 0, so the cause is in the data: {go_on}"
    else:
        advice = f"Lower the learning rate, or {go_on}"
    return (
        f"{what} is not finite at step {step}; that update was left out and the state saved at "
        f"step {saved_at}. {advice}"
    )


def _is_finite(array: jax.Array) -> bool:
    return bool(jnp.isfinite(array).all())
