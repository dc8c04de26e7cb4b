"""Experts on the devices that hold them: tokens are sent there, and what becomes of them back.

With a capacity every expert has that many places for each row: places are exchanged between the
devices that share the experts (all-to-all). Without one it is not known before how many tokens
come to an expert: these devices gather all their tokens, each picks those of its own experts, and
the sums are scattered back.

Everything here runs on each device by itself (`shard_map`). Axes of one device have no
communication, so without a mesh there is none.

Shape letters: B batch, L length, D model, F feed-forward, K choices of a token, T tokens,
E experts, C capacity, S places of all experts.
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
from lm.parallel.pipeline import is_pipelined
from lm.parallel.sharding import ACTIVATIONS, PARAMETERS, Rules, current_mesh, divided


class Routes(NamedTuple):
    """Where each token goes. An expert that is not below their number is none.

    `places_BLK` are positions in the queue of an expert for a row, below its capacity.
    """

    experts_BLK: jax.Array
    places_BLK: jax.Array
    weights_BLK: jax.Array


Parameters = Mapping[str, jax.Array]
# Rows in the order of their experts times the matrix of each one's expert, plus its bias.
Product = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
FeedForward = Callable[[Parameters, jax.Array, Product], jax.Array]


def mixture(
    feed_forward: FeedForward,
    parameters: Parameters,
    names: Mapping[str, Sequence[str]],
    x_BLD: jax.Array,
    routes: Routes,
    capacity: int,
) -> jax.Array:
    """The weighted sum of each token's experts, [B, L, D] float32; 0 for a token without any.

    `parameters` are [E, …] each, with the logical `names` of their axes. Capacity 0: nothing is
    dropped.
    """
    mesh = current_mesh()
    way = partial(_in_queues, capacity) if capacity else _sorted

    def on_device(parameters: Parameters, x_BLD: jax.Array, routes: Routes) -> jax.Array:
        here = {name: _local(parameter, names[name]) for name, parameter in parameters.items()}
        own = _axes(ACTIVATIONS, ("batch", "length"))
        x_BLD, routes = jax.tree.map(lambda x: _vary(x, own), (x_BLD, routes))
        n_here = len(next(iter(here.values())))
        y_BLD = way(partial(feed_forward, here), n_here, x_BLD, routes)
        return lax.psum(y_BLD, divided(PARAMETERS, "mlp"))

    if mesh is None:
        return on_device(parameters, x_BLD, routes)
    tokens = _spec(ACTIVATIONS, ("batch", "length"))
    of_parameters = {name: _spec(PARAMETERS, names[name]) for name in parameters}
    shard_map = _shard_map_of_stages if is_pipelined() else jax.shard_map
    in_specs = (of_parameters, tokens, tokens)
    on_devices = shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=tokens)
    return on_devices(parameters, x_BLD, routes)


def _shard_map_of_stages(
    on_device: Callable, mesh: Mesh, in_specs: Any, out_specs: PartitionSpec
) -> Callable:
    """`jax.shard_map` of what the pipeline maps over its stages; each device has one of them.

    JAX would map what it has traced for one stage, and with it the constants of custom gradients,
    of which it then says that they are not of every stage.
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
    return PartitionSpec(*(divided(rules, name) or None for name in names))


def _axes(rules: Rules, names: Sequence[str]) -> set[str]:
    return {axis for name in names for axis in divided(rules, name)}


def _vary(x: jax.Array, own: set[str]) -> jax.Array:
    """`x`, of which devices along the axes `own` have parts and others copies, as a value that each
    device has for itself: gradients of copies are summed."""
    all_axes = _axes(ACTIVATIONS, ("batch", "length")) | _axes(
        PARAMETERS, ("experts", "embed", "mlp")
    )
    return lax.pcast(x, tuple(sorted(all_axes - own)), to="varying")


def _local(parameter: jax.Array, names: Sequence[str]) -> jax.Array:
    """A parameter of this device's experts, as wide as the products of this device need it."""
    for dimension, name in enumerate(names):
        if name == "embed" and divided(PARAMETERS, name):
            axes = divided(PARAMETERS, name)
            parameter = lax.all_gather(parameter, axes, axis=dimension, tiled=True)
    parameter = _vary(parameter, _axes(PARAMETERS, names))
    parts = divided(PARAMETERS, "mlp")
    if "mlp" in names or not parts:
        return parameter
    # A bias of the output is added by one of the devices whose outputs are summed.
    return jnp.where(lax.axis_index(parts) == 0, parameter, 0)


def _in_queues(
    capacity: int, feed_forward: Callable, n_here: int, x_BLD: jax.Array, routes: Routes
) -> jax.Array:
    """Places are filled in on the devices of the tokens, and multiplied where the experts are."""
    shared, length_parts = divided(PARAMETERS, "experts"), divided(ACTIVATIONS, "length")
    B, L, D = x_BLD.shape
    K, E = routes.experts_BLK.shape[-1], n_here * _size(shared)
    C = -(-capacity // _size(length_parts)) * _size(length_parts)
    row_B11 = jnp.arange(B)[:, None, None]
    place_BLK = (routes.experts_BLK * B + row_B11) * C + routes.places_BLK
    place_TK = jnp.where(routes.experts_BLK < E, place_BLK, E * B * C).reshape(B * L, K)
    choice_S = _inverse(place_TK, E * B * C)
    x_SD = permute_rows(x_BLD.reshape(B * L, D), choice_S // K, place_TK)
    x_EBCD = x_SD.reshape(E, B, C, D)
    if length_parts:  # each device has filled in some of a row's places: it keeps a part of all
        x_EBCD = lax.psum_scatter(x_EBCD, length_parts, scatter_dimension=2, tiled=True)
    if shared:
        x_EBCD = lax.all_to_all(x_EBCD, shared, split_axis=0, concat_axis=1, tiled=True)
    y_ETD = feed_forward(x_EBCD.reshape(n_here, -1, D), _batched)
    y_EBCD = y_ETD.reshape(x_EBCD.shape)
    if shared:
        y_EBCD = lax.all_to_all(y_EBCD, shared, split_axis=1, concat_axis=0, tiled=True)
    if length_parts:
        y_EBCD = lax.all_gather(y_EBCD, length_parts, axis=2, tiled=True)
    y_TD = _sum_of_choices(y_EBCD.reshape(E * B * C, D), place_TK, choice_S, routes)
    return y_TD.reshape(B, L, D)


def _sorted(feed_forward: Callable, n_here: int, x_BLD: jax.Array, routes: Routes) -> jax.Array:
    """Tokens of all devices that share the experts, sorted by which expert of this device's."""
    shared, first = divided(PARAMETERS, "experts"), jnp.zeros((), jnp.int32)
    if shared:
        gather = partial(lax.all_gather, axis_name=shared, tiled=True)
        x_BLD, routes = jax.tree.map(gather, (x_BLD, routes))
        first = lax.axis_index(shared) * n_here
    B, L, D = x_BLD.shape
    T, K, E = B * L, routes.experts_BLK.shape[-1], n_here
    expert_TK = routes.experts_BLK.reshape(T, K) - first
    expert_TK = jnp.where((expert_TK >= 0) & (expert_TK < E), expert_TK, E)
    sizes_E = (expert_TK.reshape(-1, 1) == jnp.arange(E)).sum(0)
    order = jnp.argsort(expert_TK.reshape(-1), stable=True)
    S = T * min(K, E)  # a token's experts are different ones
    choice_S = jnp.where(jnp.arange(S) < sizes_E.sum(), order[:S], T * K)
    place_TK = jnp.where(expert_TK < E, _inverse(order, T * K).reshape(T, K), S)
    x_SD = permute_rows(x_BLD.reshape(T, D), choice_S // K, place_TK)
    y_SD = feed_forward(x_SD, partial(_ragged, sizes_E))
    y_BLD = _sum_of_choices(y_SD, place_TK, choice_S, routes).reshape(B, L, D)
    if shared:
        y_BLD = lax.psum_scatter(y_BLD, shared, scatter_dimension=0, tiled=True)
    return y_BLD


def _size(axes: Sequence[str]) -> int:
    return prod(lax.axis_size(axis) for axis in axes)


def _inverse(places: jax.Array, n: int) -> jax.Array:
    """Where in `places`, flat, each of 0 … n - 1 is; `places.size` for one that is nowhere."""
    flat = places.reshape(-1)
    nowhere = jnp.full_like(flat, flat.size, shape=(n,))
    return nowhere.at[flat].set(jnp.arange(flat.size, dtype=flat.dtype), mode="drop")


def _sum_of_choices(
    y_SD: jax.Array, place_TK: jax.Array, choice_S: jax.Array, routes: Routes
) -> jax.Array:
    T, K = place_TK.shape
    y_TKD = permute_rows(y_SD, place_TK.reshape(-1), choice_S[:, None]).reshape(T, K, -1)
    return (y_TKD * routes.weights_BLK.reshape(T, K, 1)).sum(1)


def _batched(x_ETD: jax.Array, kernel_EDF: jax.Array, bias_EF: jax.Array | None) -> jax.Array:
    y_ETF = jax.vmap(partial(matmul, dtype=x_ETD.dtype))(x_ETD, kernel_EDF)
    return (y_ETF if bias_EF is None else y_ETF + bias_EF[:, None]).astype(x_ETD.dtype)


def _ragged(
    sizes_E: jax.Array, x_SD: jax.Array, kernel_EDF: jax.Array, bias_EF: jax.Array | None
) -> jax.Array:
    y_SF = grouped_matmul(x_SD, kernel_EDF, sizes_E, x_SD.dtype)
    if bias_EF is not None:
        # The bias as a product too: its gradient is a sum over groups.
        ones = jnp.ones_like(x_SD, shape=(len(x_SD), 1))
        y_SF += grouped_matmul(ones, bias_EF[:, None], sizes_E, jnp.float32)
    return y_SF.astype(x_SD.dtype)
