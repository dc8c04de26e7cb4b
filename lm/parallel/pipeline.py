"""Pipeline parallelism over the mesh axis "stage".

GPipe (Huang et al. 2019), or the circular schedule (Narayanan et al. 2021, §2.2), as one program:
every iteration of a loop runs all stages in parallel (`vmap` over a dimension sharded over
"stage") and then shifts their outputs by one stage.

The batch is split into M microbatches. Layers are split into S R groups of K; group r S + s is the
r-th group of stage s, and a microbatch passes through the stages R times. Stage s starts s
iterations after stage 0 and is busy for M R of the M R + S - 1 iterations; the rest is the bubble.
Idle stages compute on whatever they hold; the results are discarded.

Outside the stack, "stage" is a data-parallel axis: each stage holds the M / S microbatches of its
own rows. They form a stream: in each iteration stage 0 takes one, the others of the same slot move
down one stage, and the last stage's output is put back into the stream. Activations move only from
stage to stage (collective-permute). With R = 1, parameters stay where they are stored, each stage
holding consecutive layers. With R > 1, parameters and their gradients are sent to and from the
stages that use them once per step (not per microbatch); no stage ever holds more than its share,
and a checkpoint is the same on any mesh.

Shape letters: S stages, R repeats, K layers of a group, N = S R K layers, M microbatches,
J = M / S slots of a stage, B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import gcd
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import LazyRng
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.parallel.gradient_accumulation import select_rows
from lm.parallel.mesh import BATCH_AXES, current_mesh, current_pipeline

Tree = Any


@dataclass(frozen=True)
class PipelineSchedule:
    """Pipeline schedule (circular for repeats > 1): what each stage computes when.

    Attributes:
        stages: size of mesh axis "stage".
        microbatches: microbatches per batch, a multiple of `stages`.
        repeats: number of passes of a microbatch through all stages.
    """

    stages: int
    microbatches: int
    repeats: int

    @property
    def iterations(self) -> int:
        """Iterations of the pipeline loop, including the bubble."""
        return self.microbatches * self.repeats + self.stages - 1

    @property
    def bubble(self) -> float:
        """Fraction of iterations in which a stage is idle."""
        return (self.stages - 1) / self.iterations

    def work(self, iteration: Any, stage: Any) -> tuple[Any, Any, Any]:
        """Return a stage's microbatch and repeat in an iteration, and whether it is busy."""
        unit = iteration - stage
        is_busy = (unit >= 0) & (unit < self.microbatches * self.repeats)
        return unit % self.microbatches, unit // self.microbatches, is_busy

    @property
    def slots(self) -> int:
        """Microbatches of the stream that each stage holds."""
        return self.microbatches // self.stages

    @property
    def joining_stage(self) -> int:
        """Stage at which an output of the last stage returns to its slot of the stream.

        Stage 0 takes a microbatch again M iterations after the previous time. By then the slot has
        shifted S - 1 times, minus the shifts before the output exists.
        """
        return self.stages - 1 - (self.stages - 1) // self.slots


def scan_as_pipeline(
    module: nn.Module,
    name: str,
    block: nn.Module,
    length: int,
    x_BLD: jax.Array,
    inputs: Any,
    layers: Tree,
    unroll: int,
) -> jax.Array:
    """Run the scan of a block (`Stack` in `lm/models/transformer.py`) as a pipeline.

    Args:
        module: running module, which owns the variables of the scan.
        name: module name of the scan.
        block: unbound scan body, called with carry, inputs and the layer's inputs.
        length: number of scan iterations.
        x_BLD: activations.
        inputs: dataclass of inputs that all layers share; its field `bias_HLS` is the same for all
            rows, other arrays are [B, …].
        layers: per-layer inputs, stacked on the first axis.
        unroll: layers of a group that are inlined; 0: all.

    Returns:
        The activations after all layers.
    """
    bias_HLS, inputs = inputs.bias_HLS, replace(inputs, bias_HLS=None)
    by_row = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else None, inputs)
    assert module.scope is not None
    collections = module.scope.mutable or []
    # Same keys as nn.scan: split over layers before the path is folded in.
    rng = keys_N = None
    if module.has_rng("dropout"):
        rng = LazyRng.create(module.scope.rngs["dropout"], name)
        keys_N = jax.random.split(rng.rng, length)

    def run_layer(
        per_layer: Any, key: jax.Array | None, x_BLD: jax.Array, by_row: Any, bias_HLS: Any
    ) -> tuple[jax.Array, Any]:
        params, layer_inputs = per_layer
        own_inputs = jax.tree.map(
            lambda row, leaf: leaf if row is None else row,
            by_row,
            inputs,
            is_leaf=lambda leaf: leaf is None,
        )
        own_inputs = replace(own_inputs, bias_HLS=bias_HLS)
        rngs: Any = {} if rng is None else {"dropout": rng.replace(rng=key)}
        arguments = (x_BLD, None), own_inputs, layer_inputs
        output: Any = block.apply({"params": params}, *arguments, rngs=rngs, mutable=collections)
        ((x_BLD, _), _), sown = output
        return x_BLD, sown

    per_layer = module.variables["params"][name], layers
    x_BLD, sown = run_pipeline(run_layer, per_layer, keys_N, x_BLD, by_row, bias_HLS, unroll)
    for collection, values in sown.items():
        module.put_variable(collection, name, values)
    return x_BLD


def run_pipeline(
    layer: Callable[..., tuple[jax.Array, Tree]],
    params: Tree,
    keys_N: jax.Array | None,
    x: jax.Array,
    per_row: Tree,
    shared: Tree,
    unroll: int,
) -> tuple[jax.Array, Tree]:
    """Run a stack of layers as a pipeline, inside `use_mesh` with a multi-stage schedule.

    Args:
        layer: one layer on a microbatch: (params, key, x, per_row, shared) → x, reports [rows, …].
        params: parameters [N, …] of all layers.
        params: parameters [N, …] of all layers.
        keys_N: per-row random key of each layer, or None.
        x: activations [B, …].
        per_row: arrays [B, …] that travel with their rows.
        shared: arrays shared by all rows.
        unroll: layers of a group that are inlined; 0: all.

    Returns:
        Activations [B, …] after all layers, and reports [N, B, …] of every layer and row.
    """
    schedule, mesh = current_pipeline(), current_mesh()
    assert schedule is not None
    assert mesh is not None
    S, J, B = schedule.stages, schedule.slots, len(x)
    stage_S, joining = jnp.arange(S), schedule.joining_stage
    stage = partial(_group, layer, schedule, keys_N, B, unroll)
    all_stages = jax.vmap(stage, in_axes=(0, 0, 0, 0, 0, None), spmd_axis_name="stage")
    params_SRK = to_circular_layout(params, S, schedule.repeats, mesh)
    # One copy per stage, so that its gradient is summed over stages once, outside the loop.
    shared_S = jax.tree.map(
        lambda c: shard_over_stages(jnp.broadcast_to(c, (S, *c.shape)), mesh), shared
    )

    def shifted(tree: Tree, by: int) -> Tree:
        return jax.tree.map(lambda a: _constrain_stages(mesh, jnp.roll(a, by, axis=0), 1), tree)

    def iteration(carry: tuple[Tree, Tree], t: jax.Array) -> tuple[tuple[Tree, Tree], Tree]:
        stream, present = carry
        slot, ended = t % J, t - (S - 1)
        arriving = jax.tree.map(lambda a: a[:, slot], stream)
        x, per_row = jax.tree.map(partial(_where, stage_S == 0), arriving, present)
        x, reports = all_stages(params_SRK, shared_S, x, per_row, stage_S, t)
        # `per_row` is back at stage 0 together with its x: a slot comes round in M iterations.
        xs, per_rows = jax.tree.map(
            lambda a, moved: a.at[:, slot].set(moved), stream, shifted(arriving, -1)
        )
        joins = (stage_S == joining) & (ended >= 0)
        joined = _where(joins, shifted(x, joining + 1), xs[:, ended % J])
        stream = (xs.at[:, ended % J].set(joined), per_rows)
        stream = jax.tree.map(lambda a: _constrain_stages(mesh, a, 2), stream)
        return (stream, shifted((x, per_row), 1)), reports

    def to_stream(a: jax.Array) -> jax.Array:
        """Reshape [B, …] to [S, J, B/M, …]; every device keeps its rows."""
        return _constrain_stages(mesh, a.reshape(S, -1, J, *a.shape[1:]).swapaxes(1, 2), 2)

    stream = jax.tree.map(to_stream, (x, per_row))
    # Idle stages start with real rows, because zeros might give NaN.
    present = jax.tree.map(lambda a: a[:, 0], stream)
    iterations = jnp.arange(schedule.iterations)
    ((xs, _), _), reports = lax.scan(iteration, (stream, present), iterations)
    # The S - 1 iterations after the last microbatch entered have shifted the stream.
    turns, odd = divmod(S - 1, J)
    back = [jnp.roll(xs[:, :odd], turns + 1, axis=0), jnp.roll(xs[:, odd:], turns, axis=0)]
    x = _constrain_stages(mesh, jnp.concatenate(back, axis=1), 2).swapaxes(1, 2).reshape(x.shape)
    return x, jax.tree.map(partial(_reorder_reports, schedule), reports)


def _group(
    layer: Callable[..., tuple[jax.Array, Tree]],
    schedule: PipelineSchedule,
    keys_N: jax.Array | None,
    B: int,
    unroll: int,
    params_RK: Tree,
    shared: Tree,
    x: jax.Array,
    per_row: Tree,
    stage: jax.Array,
    t: jax.Array,
) -> tuple[jax.Array, Tree]:
    """Run the layers of a group: the work of one stage in iteration t."""
    S, R, J = schedule.stages, schedule.repeats, schedule.slots
    microbatch, repeat, _ = schedule.work(t, stage)
    repeat = jnp.clip(repeat, 0, R - 1)
    # With one repeat, indexing would only add a scatter to the gradient.
    params_K = jax.tree.map(lambda p: p[0] if R == 1 else p[repeat], params_RK)
    keys_K = None
    if keys_N is not None:
        first = microbatch // J * (B // S) + microbatch % J
        keys_K = keys_N.reshape(R, S, -1)[repeat, stage]
        keys_K = jax.vmap(lambda key: select_rows(key, first, J))(keys_K)

    def apply_layer(
        x: jax.Array, of_layer: tuple[Tree, jax.Array | None]
    ) -> tuple[jax.Array, Tree]:
        return layer(*of_layer, x, per_row, shared)

    return lax.scan(apply_layer, x, (params_K, keys_K), unroll=unroll or True)


def _reorder_reports(schedule: PipelineSchedule, reports: jax.Array) -> jax.Array:
    """Reorder reports from [iterations, S, K, B/M, …] to [N, B, …]."""
    S, M, R = schedule.stages, schedule.microbatches, schedule.repeats
    _, _, K, rows, *rest = reports.shape
    is_busy = jnp.stack([reports[s : s + M * R, s] for s in range(S)])
    by_group = is_busy.reshape(S, R, S, schedule.slots, K, rows, *rest)
    # [R, S, K] index the layers, [S, B/M, J] the rows as they were split.
    by_layer = by_group.transpose(1, 0, 4, 2, 5, 3, *range(6, 6 + len(rest)))
    return by_layer.reshape(R * S * K, rows * M, *rest)


def _constrain_stages(mesh: Mesh, a: jax.Array, batch_axis: int) -> jax.Array:
    """Shard the first dimension of `a` [S, …] over stages and its batch over the data axes."""
    rest = [PartitionSpec.UNCONSTRAINED] * (a.ndim - batch_axis - 1)
    axes = ("stage", *[None] * (batch_axis - 1), BATCH_AXES, *rest)
    return lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(*axes)))


def _where(stages_S: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Select by stage, between arrays [S, …]."""
    return jnp.where(stages_S.reshape(-1, *[1] * (a.ndim - 1)), a, b)


def shard_over_stages(a: jax.Array, mesh: Mesh) -> jax.Array:
    """Shard the first dimension of an array over stages; leave the others to the compiler."""
    axes = ("stage", *[PartitionSpec.UNCONSTRAINED] * (a.ndim - 1))
    return lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(*axes)))


def to_circular_layout(params: Tree, S: int, R: int, mesh: Mesh) -> Tree:
    """Permute layers into circular-pipeline order.

    Args:
        params: arrays [N, …], stored in contiguous parts per stage.
        S: stages.
        R: repeats.
        mesh: mesh with axis "stage".

    Returns:
        Arrays [S, R, K, …], where [s, r] is group r S + s. Collective permutes send each group only
        to the stage that needs it.
    """
    if R == 1:
        return jax.tree.map(
            lambda p: shard_over_stages(p.reshape(S, 1, -1, *p.shape[1:]), mesh), params
        )
    rounds = exchange_rounds(S, R)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=PartitionSpec("stage"),
        out_specs=PartitionSpec("stage"),
        axis_names={"stage"},
    )
    def permuted(p: jax.Array) -> jax.Array:
        stage = lax.axis_index("stage")
        p_RK = p.reshape(R, -1, *p.shape[1:])
        result = jnp.zeros_like(p_RK)
        for groups in rounds:
            sent = lax.dynamic_index_in_dim(p_RK, jnp.array(groups)[stage] % R, keepdims=False)
            received = lax.ppermute(sent, "stage", [(g // R, g % S) for g in groups])
            place = {g % S: g // S for g in groups}
            at = jnp.array([place[s] for s in range(S)])[stage]
            result = lax.dynamic_update_index_in_dim(result, received, at, 0)
        return result[None]

    return jax.tree.map(permuted, params)


def exchange_rounds(S: int, R: int) -> list[list[int]]:
    """Return the group that each stage sends in each of R rounds of permutes.

    Stage s stores groups s R … s R + R - 1; group g goes from stage g // R to stage g mod S. In
    every round each stage sends one group and receives one.
    """
    period = S // gcd(S, R)
    return [[s * R + (k + s // period) % R for s in range(S)] for k in range(R)]
