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
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.parallel.row_keys import of_rows
from lm.parallel.rules import BATCH_AXES

Tree = Any
Index = Any  # an integer or an array of them


@dataclass(frozen=True)
class Schedule:
    """Which stage does what when; one microbatch more or less than a multiple of the stages is
    not possible."""

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
    def joining_stage(self) -> int:
        """Where in its slot of the stream an output of the last stage belongs.

        Stage 0 takes a microbatch again M iterations after it last did. By then the slot will
        have been moved on S - 1 times, less those before the output exists.
        """
        slots = self.microbatches // self.stages
        return self.stages - 1 - (self.stages - 1) // slots


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
    reports [rows, …]. `beside` are arrays
    [B, …] that go with their rows, `common` those that all rows share. `keys_N` are row keys, one
    a layer, or None.
    """
    active = _active.get()
    assert active is not None
    schedule, mesh = active
    S, M, B = schedule.stages, schedule.microbatches, x.shape[0]
    slots = M // S
    stage_S = jnp.arange(S)
    put = partial(_constrained, mesh)

    def turn(
        params_RK: Tree, common: Tree, x: jax.Array, beside: Tree, s: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, Tree]:
        """A microbatch through a group of layers; their reports are [K, B/M, …]."""
        microbatch, repeat, _ = schedule.work(t, s)
        repeat = jnp.clip(repeat, 0, schedule.repeats - 1)
        params_K = jax.tree.map(lambda p: _pick(p, repeat), params_RK)
        keys_K = None
        if keys_N is not None:
            keys_K = keys_N.reshape(schedule.repeats, S, -1)[repeat, s]
            first = microbatch // slots * (B // S) + microbatch % slots
            keys_K = jax.vmap(lambda key: of_rows(key, first, slots))(keys_K)

        def one(x: jax.Array, of_layer: tuple[Tree, jax.Array | None]) -> tuple[jax.Array, Tree]:
            return layer(*of_layer, x, beside, common)

        return lax.scan(one, x, (params_K, keys_K), unroll=unroll or True)

    all_stages = jax.vmap(turn, in_axes=(0, 0, 0, 0, 0, None), spmd_axis_name="stage")
    params_SRK = _by_turns(params, schedule, mesh)
    # A copy for each stage, so that its gradient is summed over stages once, not in the loop.
    common_S = jax.tree.map(lambda c: put(jnp.broadcast_to(c, (S, *c.shape)), None), common)

    def iteration(carry: tuple[Tree, Tree], t: jax.Array) -> tuple[tuple[Tree, Tree], Tree]:
        stream, present = carry
        arriving = jax.tree.map(lambda a: a[:, t % slots], stream)
        present = jax.tree.map(partial(_where, stage_S == 0), arriving, present)
        x, beside = present
        x, reports = all_stages(params_SRK, common_S, x, beside, stage_S, t)
        x = put(x, 1)
        moved = jax.tree.map(lambda a: put(jnp.roll(a, -1, axis=0), 1), arriving)
        stream = jax.tree.map(lambda a, new: put(a.at[:, t % slots].set(new), 2), stream, moved)
        # What goes beside returns to stage 0 by itself: a slot comes round in M iterations.
        xs, besides = stream
        ended = t - (S - 1)
        joins = (stage_S == schedule.joining_stage) & (ended >= 0)
        output = jnp.roll(x, schedule.joining_stage + 1, axis=0)
        xs = xs.at[:, ended % slots].set(_where(joins, output, xs[:, ended % slots]))
        present = jax.tree.map(lambda a: put(jnp.roll(a, 1, axis=0), 1), (x, beside))
        return ((put(xs, 2), besides), present), reports

    def cut(a: jax.Array) -> jax.Array:
        """[S, J, B/M, …]; every device keeps its rows."""
        return put(a.reshape(S, B // M, slots, *a.shape[1:]).swapaxes(1, 2), 2)

    stream = jax.tree.map(cut, (x, beside))
    # Idle stages begin with rows of their own, where zeros might make what is no number.
    present = jax.tree.map(lambda a: a[:, 0], stream)
    iterations = jnp.arange(schedule.iterations)
    ((xs, _), _), reports = lax.scan(iteration, (stream, present), iterations)
    # The S - 1 iterations after the last microbatch went in moved the stream on.
    turns, odd = divmod(S - 1, slots)
    xs = jnp.concatenate(
        [jnp.roll(xs[:, :odd], turns + 1, axis=0), jnp.roll(xs[:, odd:], turns, axis=0)], axis=1
    )
    x = put(xs, 2).swapaxes(1, 2).reshape(x.shape)
    return x, jax.tree.map(partial(_in_order, schedule), reports)


def _in_order(schedule: Schedule, reports: jax.Array) -> jax.Array:
    """[iterations, S, K, B/M, …] as [N, B, …]."""
    S, M, R = schedule.stages, schedule.microbatches, schedule.repeats
    _, _, K, rows, *rest = reports.shape
    at_work = jnp.stack([reports[s : s + M * R, s] for s in range(S)])
    by_group = at_work.reshape(S, R, S, M // S, K, rows, *rest)
    # to R, S, K: layers; S, B/M, J: rows as they were cut
    by_layer = by_group.transpose(1, 0, 4, 2, 5, 3, *range(6, 6 + len(rest)))
    return by_layer.reshape(R * S * K, S * rows * (M // S), *rest)


def _constrained(mesh: Mesh, a: jax.Array, batch_axis: int | None) -> jax.Array:
    """`a` [S, …] with its first dimension over the stages and its batch over the data axes."""
    axes: list = ["stage", *[PartitionSpec.UNCONSTRAINED] * (a.ndim - 1)]
    if batch_axis is not None:
        axes[1:batch_axis] = [None] * (batch_axis - 1)
        axes[batch_axis] = BATCH_AXES
    return lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(*axes)))


def _where(stages_S: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(stages_S.reshape(-1, *[1] * (a.ndim - 1)), a, b)


def _pick(p_R: jax.Array, repeat: jax.Array) -> jax.Array:
    # With one repeat the gradient of a look-up would be a scatter for nothing.
    return p_R[0] if len(p_R) == 1 else lax.dynamic_index_in_dim(p_R, repeat, keepdims=False)


def _by_turns(params: Tree, schedule: Schedule, mesh: Mesh) -> Tree:
    """[N, …], stored in contiguous parts, as [S, R, K, …] where [s, r] is group r S + s."""
    S, R = schedule.stages, schedule.repeats
    if R == 1:
        return jax.tree.map(
            lambda p: _constrained(mesh, p.reshape(S, 1, -1, *p.shape[1:]), None), params
        )
    rounds = exchange(S, R)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=PartitionSpec("stage"),
        out_specs=PartitionSpec("stage"),
        axis_names={"stage"},
    )
    def exchanged(p: jax.Array) -> jax.Array:
        stage = lax.axis_index("stage")
        p_RK = p.reshape(R, -1, *p.shape[1:])
        turns = jnp.zeros_like(p_RK)
        for groups in rounds:
            sent = lax.dynamic_index_in_dim(p_RK, jnp.array(groups)[stage] % R, keepdims=False)
            received = lax.ppermute(sent, "stage", [(g // R, g % S) for g in groups])
            place = {g % S: g // S for g in groups}
            at = jnp.array([place[s] for s in range(S)])[stage]
            turns = lax.dynamic_update_index_in_dim(turns, received, at, 0)
        return turns[None]

    return jax.tree.map(exchanged, params)


def exchange(S: int, R: int) -> list[list[int]]:
    """R rounds; in each, stage s sends one of its stored groups s R … s R + R - 1, and each stage
    receives one: group g goes from stage g // R to stage g mod S."""
    period = S // gcd(S, R)
    return [[s * R + (k + s // period) % R for s in range(S)] for k in range(R)]
