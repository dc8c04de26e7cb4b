"""Expert parallelism: tokens are sent to the devices of their experts, and the results back.

With a capacity, every expert has that many slots for each row, and slots are exchanged between the
devices that share the experts (all-to-all; GShard, Lepikhin et al. 2021). Without one (dropless)
the number of tokens per expert is not known in advance: these devices all-gather their tokens,
each selects those of its own experts, and the sums are reduce-scattered.

All of this runs per device (`shard_map`). Mesh axes of size one have no communication, so
without a mesh there is none.

Shape letters: B batch, L length, D model, F feed-forward, K choices of a token, T tokens,
E experts, C capacity, S slots of all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lm.kernels.dense import matmul
from lm.kernels.gpu_grouped_matmul import gpu_grouped_problem
from lm.kernels.grouped_matmul import GroupedKernel, grouped_matmul, permute_rows
from lm.models.attention import CALLED
from lm.parallel.mesh import (
    ACTIVATIONS,
    PARAMETERS,
    Rules,
    current_mesh,
    current_pipeline,
    parameter_axes,
    print_on_primary_host,
)


class Routing(NamedTuple):
    """Experts of each token.

    Attributes:
        experts_BLK: expert indices; a token is dropped where its index is E.
        positions_BLK: position in the expert's queue of the row, below its capacity.
        weights_BLK: weights of the experts' outputs.
    """

    experts_BLK: jax.Array
    positions_BLK: jax.Array
    weights_BLK: jax.Array


class LocalParam(NamedTuple):
    """Parameter of a device's experts; a kernel may be transposed, [E, outputs, inputs]."""

    value: jax.Array
    transposed: bool = False


class ExpertMatmul(Protocol):
    """Linear map of rows sorted by expert, each with its expert's kernel and bias.

    The output map may weight the rows, so that the backward pass does not need the outputs.
    """

    def __call__(
        self, x: jax.Array, kernel: LocalParam, bias: LocalParam | None, *, is_last: bool
    ) -> jax.Array: ...


ExpertParams = Mapping[str, LocalParam]
ExpertFeedForward = Callable[[ExpertParams, jax.Array, ExpertMatmul], jax.Array]


def mixture_of_experts(
    feed_forward: ExpertFeedForward,
    parameters: Mapping[str, jax.Array],
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
    mesh, parts = current_mesh(), _sharded_axes(PARAMETERS, "mlp")
    kernel = _grouped_kernel()
    widths = {name: _width_axes(x.shape, names[name]) for name, x in parameters.items()}
    dispatch = partial(_with_capacity, capacity) if capacity else partial(_dropless, kernel)

    def on_device(shards: Mapping[str, jax.Array], x_BLD: jax.Array, routing: Routing) -> jax.Array:
        local = {
            name: _local_params(shard, names[name], widths[name], kernel.is_call)
            for name, shard in shards.items()
        }
        n_local = len(next(iter(shards.values())))
        y_BLD = dispatch(partial(feed_forward, local), n_local, x_BLD, routing)
        return y_BLD[None] if parts else y_BLD

    if mesh is None:
        return on_device(parameters, x_BLD, routing)
    tokens = _spec(ACTIVATIONS, ("batch", "length"))
    of_parameters = {
        name: _spec({**PARAMETERS, "embed": widths[name]}, names[name]) for name in parameters
    }
    shard_map = _shard_map_in_pipeline if current_pipeline() else _shard_map
    # Shards of "mlp" are summed outside, so that the gradient needs no communication.
    out_specs = PartitionSpec(parts, *tokens) if parts else tokens
    in_specs = (of_parameters, tokens, tokens)
    on_devices = shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    y = on_devices(parameters, x_BLD, routing)
    return y.sum(0) if parts else y


# The check of varying axes (check_vma) does not support Pallas. Without it every output names all
# axes that it varies over, and an input's gradient is summed over the axes that it does not name.
_shard_map = partial(jax.shard_map, check_vma=False)


def _shard_map_in_pipeline(
    on_device: Callable, mesh: Mesh, in_specs: Any, out_specs: PartitionSpec
) -> Callable:
    """Apply `jax.shard_map` inside the pipeline, which maps it over its stages.

    JAX's own batching rule would map the trace of one stage, and reject custom gradients'
    constants in it as not varying over the stages.
    """

    def by_stage(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec("stage", *spec)

    def stage_function(*args: Any) -> jax.Array:
        return on_device(*jax.tree.map(lambda x: x[0], args))[None]

    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    stage_specs = jax.tree.map(by_stage, (in_specs, out_specs), is_leaf=is_spec)
    of_stages = _shard_map(
        stage_function, mesh=mesh, in_specs=stage_specs[0], out_specs=stage_specs[1]
    )
    on_devices = _shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    mapped = jax.custom_batching.custom_vmap(on_devices)

    @mapped.def_vmap
    def _(n_stages: int, is_mapped: Any, *args: Any) -> tuple[jax.Array, bool]:
        def unmapped(x: jax.Array, has_stages: bool) -> jax.Array:
            return x if has_stages else jnp.broadcast_to(x, (n_stages, *x.shape))

        return of_stages(*jax.tree.map(unmapped, args, tuple(is_mapped))), True

    return mapped


def _spec(rules: Rules, names: Sequence[str]) -> PartitionSpec:
    """Return the PartitionSpec of an array on the current mesh."""
    return PartitionSpec(*(_sharded_axes(rules, name) or None for name in names))


def _width_axes(shape: Sequence[int], names: Sequence[str]) -> tuple[str, ...]:
    """Return the current mesh's axes of size above one that shard a parameter's width."""
    mesh = current_mesh()
    if mesh is None or "embed" not in names:
        return ()
    axes = parameter_axes(mesh.shape, "embed", shape[names.index("embed")]) or ()
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def _local_params(
    parameter: jax.Array, names: Sequence[str], axes: tuple[str, ...], may_transpose: bool
) -> LocalParam:
    """Gather the FSDP shards of the local experts.

    `may_transpose` gathers into the second dimension: gathering into the last one would copy the
    whole kernel, and its gradient, for a product that is a library call.
    """
    transposed = False
    if axes:
        dimension = names.index("embed")
        if may_transpose and dimension == 2:
            parameter, dimension, transposed = parameter.swapaxes(1, 2), 1, True
        parameter = lax.all_gather(parameter, axes, axis=dimension, tiled=True)
    parts = _sharded_axes(PARAMETERS, "mlp")
    if parts and "mlp" not in names:
        # The output bias is added on only one of the devices whose outputs are summed.
        parameter = jnp.where(lax.axis_index(parts) == 0, parameter, 0)
    return LocalParam(parameter, transposed)


def _with_capacity(
    capacity: int, feed_forward: Callable, n_local: int, x_BLD: jax.Array, routing: Routing
) -> jax.Array:
    """Fill slots on the tokens' devices, and multiply them on the experts' devices."""
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
    if length_parts:  # each device has filled some of a row's slots: sum and keep the local shard
        x_EBCD = lax.psum_scatter(x_EBCD, length_parts, scatter_dimension=2, tiled=True)
    if shared:
        x_EBCD = lax.all_to_all(x_EBCD, shared, split_axis=0, concat_axis=1, tiled=True)
    y_ETD = feed_forward(x_EBCD.reshape(n_local, -1, D), _batched_linear)
    y_EBCD = y_ETD.reshape(*x_EBCD.shape[:3], -1)  # the output may have a different width
    if shared:
        y_EBCD = lax.all_to_all(y_EBCD, shared, split_axis=1, concat_axis=0, tiled=True)
    if length_parts:
        y_EBCD = lax.all_gather(y_EBCD, length_parts, axis=2, tiled=True)
    y_TD = _combine_choices(y_EBCD.reshape(E * B * C, -1), slot_TK, choice_S, routing.weights_BLK)
    return y_TD.reshape(B, L, -1)


def _dropless(
    kernel: GroupedKernel, feed_forward: Callable, n_local: int, x_BLD: jax.Array, routing: Routing
) -> jax.Array:
    """Gather the tokens of all devices that share the experts; select those for this device."""
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
    S = T * min(K, E)  # a token's experts are distinct
    choice_S = jnp.where(jnp.arange(S) < sizes_E.sum(), order[:S], T * K)
    slot_TK = jnp.where(expert_TK < E, _inverse(order, T * K).reshape(T, K), S)
    x_SD = permute_rows(x_BLD.reshape(T, D), choice_S // K, slot_TK)
    n_rows = -(-T * K // _size(shared))  # assumes an even load
    weights_BLK, weights_S1 = routing.weights_BLK, None
    multiply = replace(kernel, n_rows=n_rows)
    if kernel.is_call:
        flat = weights_BLK.reshape(-1, 1)
        weights_S1 = permute_rows(flat, choice_S, slot_TK.reshape(-1, 1))
    y_SD = feed_forward(x_SD, partial(_grouped_linear, sizes_E, multiply, weights_S1))
    after = weights_BLK if weights_S1 is None else None
    y_BLD = _combine_choices(y_SD, slot_TK, choice_S, after).reshape(B, L, -1)
    if shared:
        y_BLD = lax.psum_scatter(y_BLD, shared, scatter_dimension=0, tiled=True)
    return y_BLD


def _size(axes: Sequence[str]) -> int:
    return prod(lax.axis_size(axis) for axis in axes)


def _inverse(slots: jax.Array, n: int) -> jax.Array:
    """Invert a map into n slots: each slot's flat index in `slots`, `slots.size` if empty."""
    flat = slots.reshape(-1)
    empty = jnp.full_like(flat, flat.size, shape=(n,))
    return empty.at[flat].set(jnp.arange(flat.size, dtype=flat.dtype), mode="drop")


def _combine_choices(
    y_SD: jax.Array, slot_TK: jax.Array, choice_S: jax.Array, weights_BLK: jax.Array | None
) -> jax.Array:
    """Sum the outputs of each token's choices, weighted if they are not yet, [T, D] float32."""
    T, K = slot_TK.shape
    y_TKD = permute_rows(y_SD, slot_TK.reshape(-1), choice_S[:, None]).reshape(T, K, -1)
    if weights_BLK is None:
        return y_TKD.sum(1, dtype=jnp.float32)
    return (y_TKD * weights_BLK.reshape(T, K, 1)).sum(1)


def _batched_linear(
    x_ETD: jax.Array, kernel: LocalParam, bias: LocalParam | None, *, is_last: bool
) -> jax.Array:
    """Apply the linear layer of each expert to its rows."""
    del is_last
    product = partial(matmul, dtype=x_ETD.dtype, transposed=kernel.transposed)
    y_ETF = jax.vmap(product)(x_ETD, kernel.value)
    return (y_ETF if bias is None else y_ETF + bias.value[:, None]).astype(x_ETD.dtype)


def _grouped_linear(
    sizes_E: jax.Array,
    multiply: GroupedKernel,
    weights_S1: jax.Array | None,
    x_SD: jax.Array,
    kernel: LocalParam,
    bias: LocalParam | None,
    *,
    is_last: bool,
) -> jax.Array:
    """Apply the linear layers of the experts to rows sorted by expert."""
    dtype, float32 = x_SD.dtype, jnp.dtype(jnp.float32)
    ones_S1 = jnp.ones_like(x_SD, shape=(x_SD.shape[0], 1))
    if is_last and weights_S1 is not None:
        x_SD, ones_S1 = (x_SD * weights_S1).astype(dtype), weights_S1
    out_dtype = dtype if bias is None else float32
    y_SF = grouped_matmul(
        x_SD, kernel.value, sizes_E, dtype, out_dtype, multiply, kernel.transposed
    )
    if bias is not None:
        # The bias is also a product, whose gradient sums over groups.
        ends_E, rows_S1 = jnp.cumsum(sizes_E), jnp.arange(x_SD.shape[0])[:, None]
        is_in_group_SE = (rows_S1 >= ends_E - sizes_E) & (rows_S1 < ends_E)
        y_SF += matmul(is_in_group_SE * ones_S1, bias.value, dtype)
    return y_SF.astype(dtype)


def _grouped_kernel() -> GroupedKernel:
    """Return the grouped-product kernel for the devices of the mesh, or of this process.

    Without a mesh XLA may shard a product, which it cannot do for Pallas kernels.
    """
    mesh = current_mesh()
    if mesh is None and jax.device_count() > 1:
        return GroupedKernel()
    device = mesh.devices.flat[0] if mesh else None
    platform = device.platform if device else jax.default_backend()
    platform = CALLED.get(platform, platform)
    if platform != "gpu":
        return GroupedKernel("megablox" if platform == "tpu" else "xla")
    problem = gpu_grouped_problem(getattr(device, "compute_capability", ""))
    if problem:
        _say_once(
            f"experts: XLA multiplies all rows by each; tokamax cannot be used with {problem}"
        )
    return GroupedKernel("xla" if problem else "tokamax")


_say_once = cache(print_on_primary_host)


def _sharded_axes(rules: Rules, name: str) -> tuple[str, ...]:
    """Return the current mesh's axes of size above one that shard a logical axis."""
    axes, mesh = rules[name], current_mesh()
    return tuple(axis for axis in axes if mesh is not None and mesh.shape[axis] > 1)
