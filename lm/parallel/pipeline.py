"""Pipeline parallelism over the mesh axis "stage" (GPipe, Huang et al. 2019; circular: Narayanan
et al. 2021, §2.2), written as one program: a loop whose every iteration runs all stages side by
side (`vmap` over a dimension that is sharded over "stage") and then shifts their outputs by one.

The batch is cut into M microbatches. Layers are cut into S R groups of K, group r S + s being the
r-th of stage s, and a microbatch passes the stages R times. Stage s begins s iterations after
stage 0, and works without a pause for M R iterations out of M R + S - 1: the rest is the bubble.
Idle stages compute on what they have, and nothing comes of it.

Outside the stack, "stage" is an axis of data parallelism: each stage holds the M / S microbatches
of its own rows. They flow as a stream: in each iteration stage 0 takes one, the others of the same
slot move one stage down, and the last stage's output takes a place in the stream. Activations are
only ever sent from stage to stage (collective-permute). Parameters stay where they are stored,
[layers] in contiguous parts, if R = 1; with R > 1 they are sent to the stages that take turns
once a step (not once a microbatch), and so are their gradients.

Shape letters: S stages, R repeats, K layers of a group, N = S R K layers, M microbatches,
J = M / S slots of a stage, B batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.parallel.circular_layout import over_stages, to_circular_layout
from lm.parallel.per_row_rng import of_rows
from lm.parallel.sharding import BATCH_AXES

Tree = Any
Index = Any  # an integer or an array of them


@dataclass(frozen=True)
class Schedule:
    """Which stage does what when; microbatches are a multiple of the stages."""

    stages: int
    microbatches: int
    repeats: int

    @property
    def iterations(self) -> int:
        return self.microbatches * self.repeats + self.stages - 1

    @property
    def bubble(self) -> float:
        """The part of the time that a stage is idle."""
        return (self.stages - 1) / self.iterations

    def work(self, iteration: Index, stage: Index) -> tuple[Index, Index, Index]:
        """The microbatch and the repeat that a stage is at in an iteration, and whether it is at
        work at all."""
        unit = iteration - stage
        at_work = (unit >= 0) & (unit < self.microbatches * self.repeats)
        return unit % self.microbatches, unit // self.microbatches, at_work

    @property
    def slots(self) -> int:
        """Microbatches that a stage holds of the stream."""
        return self.microbatches // self.stages

    @property
    def joining_stage(self) -> int:
        """Where in its slot of the stream an output of the last stage belongs.

        Stage 0 takes a microbatch again M iterations after it last did. By then the slot will
        have been moved on S - 1 times, less those before the output exists.
        """
        return self.stages - 1 - (self.stages - 1) // self.slots


_active: ContextVar[tuple[Schedule, Mesh] | None] = ContextVar("pipeline", default=None)


@contextlib.contextmanager
def pipelined(schedule: Schedule, mesh: Mesh) -> Iterator[None]:
    """Stacks traced inside this context run as pipelines, if there is more than one stage."""
    token = _active.set((schedule, mesh) if schedule.stages > 1 else None)
    try:
        yield
    finally:
        _active.reset(token)


def is_pipelined() -> bool:
    return _active.get() is not None


def run_pipeline(
    layer: Callable[..., tuple[jax.Array, Tree]],
    params: Tree,
    keys_N: jax.Array | None,
    x: jax.Array,
    beside: Tree,
    common: Tree,
    unroll: int,
) -> tuple[jax.Array, Tree]:
    """x [B, …] after all layers, in the order of the [N, …] arrays of `params`, and what the layers
    reported of every row, [N, B, …].

    layer(params, key, x, beside, common) is one layer on a part of the batch, and gives x and
    reports [rows, …]. `beside` are arrays [B, …] that go with their rows, `common` those that all
    rows share. `keys_N` are row keys, one a layer, or None. `unroll` layers of a group are
    inlined, 0: all.
    """
    active = _active.get()
    assert active is not None
    schedule, mesh = active
    S, J, B = schedule.stages, schedule.slots, len(x)
    stage_S, joining = jnp.arange(S), schedule.joining_stage
    stage = partial(_group, layer, schedule, keys_N, B, unroll)
    all_stages = jax.vmap(stage, in_axes=(0, 0, 0, 0, 0, None), spmd_axis_name="stage")
    params_SRK = to_circular_layout(params, S, schedule.repeats, mesh)
    # A copy for each stage, so that its gradient is summed over stages once, not in the loop.
    common_S = jax.tree.map(lambda c: over_stages(jnp.broadcast_to(c, (S, *c.shape)), mesh), common)

    def shifted(tree: Tree, by: int) -> Tree:
        return jax.tree.map(lambda a: _lies(mesh, jnp.roll(a, by, axis=0), 1), tree)

    def iteration(carry: tuple[Tree, Tree], t: jax.Array) -> tuple[tuple[Tree, Tree], Tree]:
        stream, present = carry
        slot, ended = t % J, t - (S - 1)
        arriving = jax.tree.map(lambda a: a[:, slot], stream)
        x, beside = jax.tree.map(partial(_where, stage_S == 0), arriving, present)
        x, reports = all_stages(params_SRK, common_S, x, beside, stage_S, t)
        # What goes beside is at stage 0 again when its x is: a slot comes round in M iterations.
        xs, besides = jax.tree.map(
            lambda a, moved: a.at[:, slot].set(moved), stream, shifted(arriving, -1)
        )
        joins = (stage_S == joining) & (ended >= 0)
        joined = _where(joins, shifted(x, joining + 1), xs[:, ended % J])
        stream = (xs.at[:, ended % J].set(joined), besides)
        stream = jax.tree.map(lambda a: _lies(mesh, a, 2), stream)
        return (stream, shifted((x, beside), 1)), reports

    def cut(a: jax.Array) -> jax.Array:
        """[S, J, B/M, …]; every device keeps its rows."""
        return _lies(mesh, a.reshape(S, -1, J, *a.shape[1:]).swapaxes(1, 2), 2)

    stream = jax.tree.map(cut, (x, beside))
    # Idle stages begin with rows of their own, where zeros might make what is no number.
    present = jax.tree.map(lambda a: a[:, 0], stream)
    iterations = jnp.arange(schedule.iterations)
    ((xs, _), _), reports = lax.scan(iteration, (stream, present), iterations)
    # The S - 1 iterations after the last microbatch went in have moved the stream on.
    turns, odd = divmod(S - 1, J)
    back = [jnp.roll(xs[:, :odd], turns + 1, axis=0), jnp.roll(xs[:, odd:], turns, axis=0)]
    x = _lies(mesh, jnp.concatenate(back, axis=1), 2).swapaxes(1, 2).reshape(x.shape)
    return x, jax.tree.map(partial(_in_order, schedule), reports)


def _group(
    layer: Callable[..., tuple[jax.Array, Tree]],
    schedule: Schedule,
    keys_N: jax.Array | None,
    B: int,
    unroll: int,
    params_RK: Tree,
    common: Tree,
    x: jax.Array,
    beside: Tree,
    stage: jax.Array,
    t: jax.Array,
) -> tuple[jax.Array, Tree]:
    """What a stage does in iteration t: a microbatch through a group of its layers."""
    S, R, J = schedule.stages, schedule.repeats, schedule.slots
    microbatch, repeat, _ = schedule.work(t, stage)
    repeat = jnp.clip(repeat, 0, R - 1)
    # With one repeat the gradient of a look-up would be a scatter for nothing.
    params_K = jax.tree.map(lambda p: p[0] if R == 1 else p[repeat], params_RK)
    keys_K = None
    if keys_N is not None:
        first = microbatch // J * (B // S) + microbatch % J
        keys_K = keys_N.reshape(R, S, -1)[repeat, stage]
        keys_K = jax.vmap(lambda key: of_rows(key, first, J))(keys_K)

    def one(x: jax.Array, of_layer: tuple[Tree, jax.Array | None]) -> tuple[jax.Array, Tree]:
        return layer(*of_layer, x, beside, common)

    return lax.scan(one, x, (params_K, keys_K), unroll=unroll or True)


def _in_order(schedule: Schedule, reports: jax.Array) -> jax.Array:
    """[iterations, S, K, B/M, …] as [N, B, …]."""
    S, M, R = schedule.stages, schedule.microbatches, schedule.repeats
    _, _, K, rows, *rest = reports.shape
    at_work = jnp.stack([reports[s : s + M * R, s] for s in range(S)])
    by_group = at_work.reshape(S, R, S, schedule.slots, K, rows, *rest)
    # [R, S, K] are the layers, and [S, B/M, J] the rows as they were cut.
    by_layer = by_group.transpose(1, 0, 4, 2, 5, 3, *range(6, 6 + len(rest)))
    return by_layer.reshape(R * S * K, rows * M, *rest)


def _lies(mesh: Mesh, a: jax.Array, batch_axis: int) -> jax.Array:
    """`a` [S, …] with its first dimension over the stages and its batch over the data axes."""
    rest = [PartitionSpec.UNCONSTRAINED] * (a.ndim - batch_axis - 1)
    axes = ("stage", *[None] * (batch_axis - 1), BATCH_AXES, *rest)
    return lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(*axes)))


def _where(stages_S: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(stages_S.reshape(-1, *[1] * (a.ndim - 1)), a, b)
