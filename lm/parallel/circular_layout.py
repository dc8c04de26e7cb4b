"""Where the groups of layers of a circular pipeline are: stored in order, used in turns.

Stored, each stage holds neighbouring layers, whatever the schedule: so a checkpoint is the same on
any mesh. Used, group r S + s is the r-th of stage s. In between the groups are sent by collective
permutes, every one to the one stage that needs it; no stage ever holds more than its share.

Shape letters: S stages, R repeats, K layers of a group, N = S R K layers.
"""

from __future__ import annotations

from functools import partial
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = Any


def over_stages(a: jax.Array, mesh: Mesh) -> jax.Array:
    """`a` with its first dimension, and it only, sharded over the stages if it was not."""
    axes = ("stage", *[PartitionSpec.UNCONSTRAINED] * (a.ndim - 1))
    return lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(*axes)))


def to_circular_layout(params: Tree, S: int, R: int, mesh: Mesh) -> Tree:
    """[N, …], stored in contiguous parts, as [S, R, K, …] where [s, r] is group r S + s."""
    if R == 1:
        return jax.tree.map(lambda p: over_stages(p.reshape(S, 1, -1, *p.shape[1:]), mesh), params)
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
