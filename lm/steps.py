"""The training and evaluation steps: pure functions of state and batch, for any model.

Shape letters: S steps of one dispatch, B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from lm.objectives.objective import Batch, Objective, Sums

Params = Any
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """All that a training step reads and writes; `step` counts the updates so far."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState


@dataclass(frozen=True)
class Steps:
    """The pure functions of one experiment."""

    model: nn.Module
    objective: Objective
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    seed: int
    microbatches: int

    def init_params(self, inputs: tuple[Any, ...]) -> Params:
        """Fresh parameters, boxed with the logical names of their axes; `inputs` give shapes."""
        rng = jax.random.fold_in(jax.random.key(self.seed), -1 & 0xFFFFFFFF)
        return self.model.init(rng, *inputs)["params"]

    def init_state(self, inputs: tuple[Any, ...]) -> TrainState:
        """The state before the first step."""
        params = nn.meta.unbox(self.init_params(inputs))
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params))

    def train_steps(self, state: TrainState, batches: Batch) -> tuple[TrainState, Metrics]:
        """One update for each batch of [S, B, …] arrays; metrics are [S]."""
        return jax.lax.scan(self.train_step, state, batches)

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update. Where loss or gradient is not finite, only the step counter advances."""
        rng = jax.random.fold_in(jax.random.key(self.seed), state.step)
        grads, sums = self._gradients(state.params, batch, rng)
        weight = jnp.where(sums.weight > 0, sums.weight, 1)
        grads = jax.tree.map(lambda g: g / weight, grads)
        loss, grad_norm = sums.loss / weight, optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        metrics = {
            "loss": loss,
            **{name: value / weight for name, value in sums.metrics.items()},
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(self.schedule(state.step), jnp.float32),
            "target_tokens": sums.weight,
            "skipped": 1 - finite.astype(jnp.int32),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    def eval_steps(self, params: Params, batches: Batch) -> Sums:
        """The objective's sums, [S], over each batch of [S, B, …] arrays, without dropout."""
        apply = self._apply(params, None)
        return jax.lax.map(lambda batch: self.objective.loss(apply, batch), batches)

    def _apply(self, params: Params, rng: jax.Array | None) -> Callable[..., Any]:
        rngs = None if rng is None else {"dropout": rng}
        return lambda *inputs: self.model.apply(
            {"params": params}, *inputs, deterministic=rng is None, rngs=rngs
        )

    def _gradients(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Params, Sums]:
        """Gradient of the summed loss, and the sums, added up over the microbatches."""

        def of_part(part: Batch, rng: jax.Array) -> tuple[Params, Sums]:
            def loss(params: Params) -> tuple[jax.Array, Sums]:
                sums = self.objective.loss(self._apply(params, rng), part)
                return sums.loss, sums

            return jax.grad(loss, has_aux=True)(params)

        n = self.microbatches
        if n == 1:
            return of_part(batch, rng)
        # Row r goes to microbatch r mod n: each device keeps its rows, whatever the mesh.
        parts = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def add(total: Any, part_and_index: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            part, index = part_and_index
            return jax.tree.map(jnp.add, total, of_part(part, jax.random.fold_in(rng, index))), None

        shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts), rng)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, (parts, jnp.arange(n)))[0]
