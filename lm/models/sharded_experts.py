"""Expert parallelism: tokens are sent to the devices of their experts, and the results back.

With a capacity, every expert has that many slots for each row, and slots are exchanged between the
devices that share the experts (all-to-all; GShard, Lepikhin et al. 2021). Without one (dropless)
the number of tokens of an expert is not known in advance: these devices all-gather their tokens,
each selects those of its own experts, and the sums are reduce-scattered.

Everything here runs per device (`shard_map`). Mesh axes of one device have no communication, so
without a mesh there is none.

Shape letters: B batch, L length, D model, F feed-forward, K choices of a token, T tokens,
E experts, C capacity, S slots of all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lm.kernels.dense import matmul
from lm.kernels.grouped_matmul import grouped_matmul, permute_rows
from lm.parallel.mesh import ACTIVATIONS, PARAMETERS, Rules, current_mesh, current_pipeline


class Routing(NamedTuple):
    """Experts of each token.

    Attributes:
        experts_BLK: expert indices; a token is dropped where the index is not below E.
        positions_BLK: position in the expert's queue of the row, below its capacity.
        weights_BLK: weights of the experts' outputs.
    """

    experts_BLK: jax.Array
    positions_BLK: jax.Array
    weights_BLK: jax.Array


ExpertParams = Mapping[str, jax.Array]
# (rows sorted by expert, kernels, biases) → each row times its expert's kernel, plus its bias.
ExpertMatmul = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
ExpertFeedForward = Callable[[ExpertParams, jax.Array, ExpertMatmul], jax.Array]


def mixture_of_experts(
    feed_forward: ExpertFeedForward,
    parameters: ExpertParams,
    names: Mapping[str, Sequence[str]],
    x_BLD: jax.Array,
    routing: Routing,
    capacity: int,
) -> jax.Array:
    """Compute the weighted sum of each token's experts.

    Args:
        feed_forward: feed-forward network of all experts: (params, rows, linear) → rows.
        parameters: parameters [E, …] by name.
        names: logical names of the axes of each parameter.
        x_BLD: tokens.
        routing: experts of each token.
        capacity: slots of an expert for each row; 0 for dropless.

    Returns:
        The sums [B, L, D] float32; 0 for a token without experts.
    """
    mesh = current_mesh()
    dispatch = partial(_with_capacity, capacity) if capacity else _dropless

    def on_device(parameters: ExpertParams, x_BLD: jax.Array, routing: Routing) -> jax.Array:
        local = {
            name: _local_params(parameter, names[name]) for name, parameter in parameters.items()
        }
        own = _axes(ACTIVATIONS, ("batch", "length"))
        x_BLD, routing = jax.tree.map(lambda x: _mark_varying(x, own), (x_BLD, routing))
        n_local = len(next(iter(local.values())))
        y_BLD = dispatch(partial(feed_forward, local), n_local, x_BLD, routing)
        return lax.psum(y_BLD, _sharded_axes(PARAMETERS, "mlp"))

    if mesh is None:
        return on_device(parameters, x_BLD, routing)
    tokens = _spec(ACTIVATIONS, ("batch", "length"))
    of_parameters = {name: _spec(PARAMETERS, names[name]) for name in parameters}
    shard_map = _shard_map_in_pipeline if current_pipeline() else jax.shard_map
    in_specs = (of_parameters, tokens, tokens)
    on_devices = shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=tokens)
    return on_devices(parameters, x_BLD, routing)


def _shard_map_in_pipeline(
    on_device: Callable, mesh: Mesh, in_specs: Any, out_specs: PartitionSpec
) -> Callable:
    """Apply `jax.shard_map` inside the pipeline, which maps it over its stages.

    JAX's own batching rule would map the trace of one stage, and reject the constants of custom
    gradients in it as not varying over the stages.
    """

    def by_stage(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec("stage", *spec)

    def of_stage(*args: Any) -> jax.Array:
        return on_device(*jax.tree.map(lambda x: x[0], args))[None]

    of_stages = jax.shard_map(
        of_stage,
        mesh=mesh,
        in_specs=jax.tree.map(
            by_stage, in_specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
        ),
        out_specs=by_stage(out_specs),
    )
    on_devices = jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    mapped = jax.custom_batching.custom_vmap(on_devices)

    @mapped.def_vmap
    def _(n_stages: int, is_mapped: Any, *args: Any) -> tuple[jax.Array, bool]:
        def of_each(x: jax.Array, has_stages: bool) -> jax.Array:
            return x if has_stages else jnp.broadcast_to(x, (n_stages, *x.shape))

        return of_stages(*jax.tree.map(of_each, args, tuple(is_mapped))), True

    return mapped


def _spec(rules: Rules, names: Sequence[str]) -> PartitionSpec:
    """Return the PartitionSpec of an array on the current mesh."""
    return PartitionSpec(*(_sharded_axes(rules, name) or None for name in names))


def _axes(rules: Rules, names: Sequence[str]) -> set[str]:
    """Return the axes of the current mesh that shard an array."""
    return {axis for name in names for axis in _sharded_axes(rules, name)}


def _mark_varying(x: jax.Array, own: set[str]) -> jax.Array:
    """Mark as device-varying, so that gradients are all-reduced over the axes that replicate `x`.

    `own` are the mesh axes that shard it.
    """
    all_axes = _axes(ACTIVATIONS, ("batch", "length")) | _axes(
        PARAMETERS, ("experts", "embed", "mlp")
    )
    return lax.pcast(x, tuple(sorted(all_axes - own)), to="varying")


def _local_params(parameter: jax.Array, names: Sequence[str]) -> jax.Array:
    """Gather the FSDP shards of the local experts."""
    for dimension, name in enumerate(names):
        if name == "embed" and _sharded_axes(PARAMETERS, name):
            axes = _sharded_axes(PARAMETERS, name)
            parameter = lax.all_gather(parameter, axes, axis=dimension, tiled=True)
    parameter = _mark_varying(parameter, _axes(PARAMETERS, names))
    parts = _sharded_axes(PARAMETERS, "mlp")
    if "mlp" in names or not parts:
        return parameter
    # Only one of the devices whose outputs are summed adds the output bias.
    return jnp.where(lax.axis_index(parts) == 0, parameter, 0)


def _with_capacity(
    capacity: int, feed_forward: Callable, n_local: int, x_BLD: jax.Array, routing: Routing
) -> jax.Array:
    """Fill slots on the devices of the tokens, and multiply them on the devices of the experts."""
    shared, length_parts = (
        _sharded_axes(PARAMETERS, "experts"),
        _sharded_axes(ACTIVATIONS, "length"),
    )
    B, L, D = x_BLD.shape
    K, E = routing.experts_BLK.shape[-1], n_local * _size(shared)
    C = -(-capacity // _size(length_parts)) * _size(length_parts)
    row_B11 = jnp.arange(B)[:, None, None]
    slot_BLK = (routing.experts_BLK * B + row_B11) * C + routing.positions_BLK
    slot_TK = jnp.where(routing.experts_BLK < E, slot_BLK, E * B * C).reshape(B * L, K)
    choice_S = _inverse(slot_TK, E * B * C)
    x_SD = permute_rows(x_BLD.reshape(B * L, D), choice_S // K, slot_TK)
    x_EBCD = x_SD.reshape(E, B, C, D)
    if length_parts:  # each device has filled some of a row's slots: it keeps a part of all
        x_EBCD = lax.psum_scatter(x_EBCD, length_parts, scatter_dimension=2, tiled=True)
    if shared:
        x_EBCD = lax.all_to_all(x_EBCD, shared, split_axis=0, concat_axis=1, tiled=True)
    y_ETD = feed_forward(x_EBCD.reshape(n_local, -1, D), _batched_linear)
    y_EBCD = y_ETD.reshape(*x_EBCD.shape[:3], -1)  # the output may have another width
    if shared:
        y_EBCD = lax.all_to_all(y_EBCD, shared, split_axis=1, concat_axis=0, tiled=True)
    if length_parts:
        y_EBCD = lax.all_gather(y_EBCD, length_parts, axis=2, tiled=True)
    y_TD = _combine_choices(y_EBCD.reshape(E * B * C, -1), slot_TK, choice_S, routing)
    return y_TD.reshape(B, L, -1)


def _dropless(
    feed_forward: Callable, n_local: int, x_BLD: jax.Array, routing: Routing
) -> jax.Array:
    """Gather the tokens of all devices that share the experts, and sort those of this device's."""
    shared, first = _sharded_axes(PARAMETERS, "experts"), jnp.zeros((), jnp.int32)
    if shared:
        gather = partial(lax.all_gather, axis_name=shared, tiled=True)
        x_BLD, routing = jax.tree.map(gather, (x_BLD, routing))
        first = lax.axis_index(shared) * n_local
    B, L, D = x_BLD.shape
    T, K, E = B * L, routing.experts_BLK.shape[-1], n_local
    expert_TK = routing.experts_BLK.reshape(T, K) - first
    expert_TK = jnp.where((expert_TK >= 0) & (expert_TK < E), expert_TK, E)
    sizes_E = (expert_TK.reshape(-1, 1) == jnp.arange(E)).sum(0)
    order = jnp.argsort(expert_TK.reshape(-1), stable=True)
    S = T * min(K, E)  # a token's experts are different ones
    choice_S = jnp.where(jnp.arange(S) < sizes_E.sum(), order[:S], T * K)
    slot_TK = jnp.where(expert_TK < E, _inverse(order, T * K).reshape(T, K), S)
    x_SD = permute_rows(x_BLD.reshape(T, D), choice_S // K, slot_TK)
    y_SD = feed_forward(x_SD, partial(_grouped_linear, sizes_E))
    y_BLD = _combine_choices(y_SD, slot_TK, choice_S, routing).reshape(B, L, -1)
    if shared:
        y_BLD = lax.psum_scatter(y_BLD, shared, scatter_dimension=0, tiled=True)
    return y_BLD


def _size(axes: Sequence[str]) -> int:
    return prod(lax.axis_size(axis) for axis in axes)


def _inverse(slots: jax.Array, n: int) -> jax.Array:
    """Invert a map into n slots: the flat index in `slots` of each, `slots.size` for empty ones."""
    flat = slots.reshape(-1)
    empty = jnp.full_like(flat, flat.size, shape=(n,))
    return empty.at[flat].set(jnp.arange(flat.size, dtype=flat.dtype), mode="drop")


def _combine_choices(
    y_SD: jax.Array, slot_TK: jax.Array, choice_S: jax.Array, routing: Routing
) -> jax.Array:
    """Sum the weighted outputs of each token's choices, [T, D]."""
    T, K = slot_TK.shape
    y_TKD = permute_rows(y_SD, slot_TK.reshape(-1), choice_S[:, None]).reshape(T, K, -1)
    return (y_TKD * routing.weights_BLK.reshape(T, K, 1)).sum(1)


def _batched_linear(
    x_ETD: jax.Array, kernel_EDF: jax.Array, bias_EF: jax.Array | None
) -> jax.Array:
    """Apply the linear layer of each expert to its rows."""
    y_ETF = jax.vmap(partial(matmul, dtype=x_ETD.dtype))(x_ETD, kernel_EDF)
    return (y_ETF if bias_EF is None else y_ETF + bias_EF[:, None]).astype(x_ETD.dtype)


def _grouped_linear(
    sizes_E: jax.Array, x_SD: jax.Array, kernel_EDF: jax.Array, bias_EF: jax.Array | None
) -> jax.Array:
    """Apply the linear layers of the experts to rows sorted by expert."""
    y_SF = grouped_matmul(x_SD, kernel_EDF, sizes_E, x_SD.dtype)
    if bias_EF is not None:
        # The bias is a product too, whose gradient sums over groups.
        ones = jnp.ones_like(x_SD, shape=(len(x_SD), 1))
        y_SF += grouped_matmul(ones, bias_EF[:, None], sizes_E, jnp.float32)
    return y_SF.astype(x_SD.dtype)


def _sharded_axes(rules: Rules, name: str) -> tuple[str, ...]:
    """Return the current mesh's axes of more than one device that shard a logical axis."""
    axes, mesh = rules[name], current_mesh()
    return tuple(axis for axis in axes if mesh is not None and mesh.shape[axis] > 1)
