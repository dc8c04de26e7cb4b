"""Training and evaluation steps: pure functions of state and batch, for any model.

Shape letters: S steps per dispatch, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lm.models.variables import (
    COLLECTIONS,
    FROZEN,
    LORA,
    MODEL_STATE,
    ParamInfo,
    Params,
    as_variables,
    param_infos,
    with_state,
)
from lm.objectives.objective import Batch, LossSums, Objective
from lm.parallel.mesh import per_row_key

if TYPE_CHECKING:  # imported at run time only if parameters are frozen
    from lm.models.parameter_groups import TrainableMask

Carry = Any
ModelState = Any
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Training state: everything that a training step reads and writes.

    Attributes:
        step: number of updates so far.
        params: parameters, with low-rank factors under "lora" and frozen models under "frozen";
            moving averages if `lm.optim.averaging` is used.
        opt_state: optimizer state.
        carry: arrays [B, …] passed from one batch to the next, such as the state of a recurrent
            model; {} for most models.
        model_state: variables of `lm.models.variables.model_state`; {} for most models.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    carry: Carry
    model_state: ModelState = field(default_factory=dict)

    @property
    def inference_params(self) -> Params:
        """Parameters and model state, as used by evaluation and decoding."""
        return with_state(self.params, self.model_state)

    def with_inference_params(self, params: Params) -> TrainState:
        """Replace the parameters and model state."""
        own = {name: leaf for name, leaf in params.items() if name != MODEL_STATE}
        return replace(self, params=own, model_state=params.get(MODEL_STATE, {}))


class Between(NamedTuple):
    """State passed from one batch to the next: per row (carry) and per model."""

    carry: Carry
    model_state: ModelState


@dataclass(frozen=True)
class Steps:
    """Pure functions of one experiment.

    Attributes:
        model: model in training mode without dropout.
        objective: objective.
        make_optimizer: builds the optimizer from the role and axes of each parameter, by path.
        trainable: mask of trainable parameters; None for all.
        lora: section "lora" of the configuration.
        schedule: learning rate as a function of the step.
        seed: seed of initialization and dropout.
        batch_size: rows of a training batch.
        microbatches: microbatches per batch, for gradient accumulation.
    """

    model: nn.Module
    objective: Objective
    make_optimizer: Callable[[Mapping[str, ParamInfo]], optax.GradientTransformation]
    trainable: TrainableMask | None
    lora: ConfigDict
    schedule: optax.Schedule
    seed: int
    batch_size: int
    microbatches: int

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shape [B, …] of each array of a batch of this size."""
        return {
            name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
            for name, (shape, dtype) in self.objective.shapes.items()
        }

    @cached_property
    def boxed_shapes(self) -> tuple[Params, Carry, ModelState]:
        """Shapes of the result of `init` for a training batch."""
        return jax.eval_shape(self.init, self.batch_shapes(self.batch_size))

    @cached_property
    def param_infos(self) -> dict[str, ParamInfo]:
        """Role and logical axes of every parameter by path; UserError if one has no role."""
        return param_infos(self.boxed_shapes[0])

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Gradient transformation of the trainable parameters."""
        return self.make_optimizer(self.param_infos)

    def init(self, batch: Batch) -> tuple[Params, Carry, ModelState]:
        """Initialize the variables that the loss of a batch uses.

        Returns:
            Parameters, boxed with axes and roles; initial carry; model state, boxed with axes.
        """
        rng = jax.random.fold_in(jax.random.key(self.seed), -1 & 0xFFFFFFFF)
        variables: Any = nn.init(self.objective.loss, self.model)(rng, batch)
        params = with_state(variables.pop("params"), variables.pop(FROZEN, {}), FROZEN)
        if self.lora.rank:
            from lm.models.lora import add_lora

            params = add_lora(params, self.lora, jax.random.fold_in(rng, 1))
        model_state = variables.pop(MODEL_STATE, {})
        carry = {name: value for name, value in variables.items() if name not in COLLECTIONS}
        return params, jax.tree.map(jnp.zeros_like, carry), model_state

    def init_state(self, batch: Batch) -> TrainState:
        """Return the initial training state."""
        params, carry, model_state = nn.meta.unbox(self.init(batch))
        opt_state = self.init_optimizer(params)
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, carry, model_state)

    def init_optimizer(self, params: Params) -> optax.OptState:
        """Return the initial optimizer state."""
        return self.optimizer.init(self.split(params)[0])

    def split(self, params: Params) -> tuple[Params, Params]:
        """Split parameters into trainable and frozen ones."""
        return (params, {}) if self.trainable is None else self.trainable.split(params)

    def _join(self, trained: Params, frozen: Params) -> Params:
        return trained if self.trainable is None else self.trainable.join(trained, frozen)

    def train_steps(self, state: TrainState, batches: Batch) -> tuple[TrainState, Metrics]:
        """Apply one update per batch of [S, B, …] arrays; metrics are [S]."""
        return jax.lax.scan(self.train_step, state, batches)

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Apply one update; if loss or gradient is not finite, only the step counter advances."""
        rng = per_row_key(jax.random.fold_in(jax.random.key(self.seed), state.step))
        trained, frozen = self.split(state.params)
        before = Between(state.carry, state.model_state)
        at = getattr(self.optimizer, "point", lambda _, x: x)(state.opt_state, trained)
        grads, sums, after = self._gradients(at, frozen, before, batch, rng)
        weight = jnp.where(sums.weight > 0, sums.weight, 1)
        grads = jax.tree.map(lambda g: g / weight, grads)
        loss, grad_norm = sums.loss / weight, optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        with jax.named_scope("optimizer"):
            updates, opt_state = self.optimizer.update(grads, state.opt_state, trained)
        updated = optax.apply_updates(trained, updates)
        updated, opt_state, after = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (updated, opt_state, after),
            (trained, state.opt_state, before),
        )
        metrics = {
            "loss": loss,
            **{name: value / weight for name, value in sums.metrics.items()},
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(self.schedule(state.step), jnp.float32),
            "target_tokens": sums.weight,
            "skipped": 1 - finite.astype(jnp.int32),
        }
        return TrainState(state.step + 1, self._join(updated, frozen), opt_state, *after), metrics

    def eval_steps(self, params: Params, carry: Carry, batches: Batch) -> tuple[Carry, LossSums]:
        """Return loss sums [S] of the batches [S, B, …], without dropout."""
        params = self._merged(params)
        model_state = params.get(MODEL_STATE, {})

        def step(carry: Carry, batch: Batch) -> tuple[Carry, LossSums]:
            sums, after = self._loss(params, Between(carry, model_state), batch, None)
            return after.carry, sums

        return jax.lax.scan(step, carry, batches)

    def predict_steps(self, params: Params, batches: Batch) -> jax.Array:
        """Return predictions [S, B, …] for each row of the batches [S, B, …]."""
        predict, variables = nn.apply(self.objective.predict, self.model), self._merged(params)
        return jax.lax.map(lambda batch: predict(as_variables(variables), batch), batches)

    def _loss(
        self, params: Params, before: Between, batch: Batch, rng: jax.Array | None
    ) -> tuple[LossSums, Between]:
        """Return a batch's loss sums and the state for the next batch.

        With `rng`, this is a training step: dropout is on and model state is updated.
        """
        model = self.model.clone(deterministic=rng is None)
        updated = (MODEL_STATE,) if before.model_state and rng is not None else ()
        mutable = [*before.carry, *COLLECTIONS, *updated]
        loss = nn.apply(self.objective.loss, model, mutable=mutable)
        rngs = None if rng is None else {"dropout": rng}
        variables = as_variables(with_state(self._merged(params), before.model_state))
        sums, after = loss({**variables, **before.carry}, batch, rngs=rngs)
        reported = {name: after.pop(name) for name in COLLECTIONS if name in after}
        model_state = after.pop(MODEL_STATE, before.model_state)
        if reported:
            from lm.objectives.layer_losses import add_sown

            sums = add_sown(sums, reported, batch)
        return sums, Between(after, model_state)

    def _merged(self, params: Params) -> Params:
        """Return model parameters with low-rank updates merged."""
        if LORA not in params:
            return params
        from lm.models.lora import adapted_params

        return adapted_params(params, self.lora.alpha, self.objective.frozen)

    def _gradients(
        self, trained: Params, frozen: Params, before: Between, batch: Batch, rng: jax.Array
    ) -> tuple[Params, LossSums, Between]:
        """Return the gradient of the summed loss, and loss sums, over all microbatches."""

        def gradients(
            before: Between, part: Batch, rng: jax.Array
        ) -> tuple[tuple[Params, LossSums], Between]:
            def loss(trained: Params) -> tuple[jax.Array, tuple[LossSums, Between]]:
                params = self._join(trained, frozen)
                sums, after = self._loss(params, before, part, rng)
                return sums.loss, (sums, after)

            grads, (sums, after) = jax.grad(loss, has_aux=True)(trained)
            return (grads, sums), after

        if self.microbatches == 1:
            (grads, sums), after = gradients(before, batch, rng)
        else:
            from lm.parallel.gradient_accumulation import accumulate

            (grads, sums), after = accumulate(gradients, self.microbatches, before, batch, rng)
        return grads, sums, after
