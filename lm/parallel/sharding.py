"""Which mesh axes shard which logical axis: one table for parameters, one for activations.

Models name the axes of their arrays ("embed", "heads", …) and know no mesh. A name without a
rule is an error, never silent replication.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.errors import UserError

Rules = dict[str, tuple[str, ...]]

PARAMETERS: Rules = {
    "layers": ("stage",),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "positions": (),
    "types": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "norm": (),
    "pooled": (),
    "classes": (),
    "lora_rank": (),
    "hidden": (),
    "gates": (),
    "experts": ("expert",),
    "router_inputs": (),
    "router": (),
}

BATCH_AXES = ("slice", "data", "fsdp", "expert")
# Outside the stack of layers, pipeline stages divide the batch too.
ROW_AXES = ("stage", *BATCH_AXES)
LENGTH_AXIS = "context"
ACTIVATIONS: Rules = {
    "batch": BATCH_AXES,
    "rows": ROW_AXES,
    "length": (LENGTH_AXIS,),
    "residual_length": (LENGTH_AXIS,),  # between the sublayers of a block
    "keys": (),  # the length of keys and values that every query can reach
    "embed": (),
    "vocab": ("tensor",),
    "positions": (),
    "types": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "hidden": (),
    "router": (),
}

# Sequence parallelism: norms, dropout and sums between the products of tensor parallelism share
# its devices too (Korthikanti et al. 2022, §4.2.2).
SEQUENCE: Rules = {"residual_length": (LENGTH_AXIS, "tensor")}

# A vocabulary is whatever the tokenizer gives, and key/value heads are few: where the mesh does
# not divide them the dimension stays whole, and `replicated_axes` reports it.
MAY_STAY_WHOLE = ("vocab", "kv_heads")

# The configuration key behind a logical axis, for error messages.
CONFIG_KEYS = {
    "layers": "model.n_layers",
    "embed": "model.d_model",
    "heads": "model.n_heads",
    "mlp": "model.d_ff",
    "experts": "model.n_experts",
}


def parameter_sharding(mesh: Mesh, names: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """The sharding of a parameter whose dimensions have these logical `names` and sizes."""
    return NamedSharding(
        mesh, PartitionSpec(*(_fit(mesh.shape, n, s) for n, s in zip(names, shape, strict=True)))
    )


def parts(sizes: Mapping[str, int], names: Sequence[str], shape: Sequence[int]) -> int:
    """Into how many parts axes of these sizes cut a parameter; UserError if they cannot."""
    axes = (_fit(sizes, name, size) or () for name, size in zip(names, shape, strict=True))
    return prod(sizes[axis] for of_dimension in axes for axis in of_dimension)


def optimizer_state_sharding(
    parameter: NamedSharding, shape: Sequence[int], statistic: Sequence[int]
) -> NamedSharding:
    """Where a statistic of an optimizer lies whose parameter has this sharding and shape.

    Its dimensions are those of the parameter, some of them left out or summed to 1 (factored
    statistics), and lie as they do; what has other dimensions is on every device.
    """
    axes, place = [], 0
    for size in statistic:
        while size > 1 and place < len(shape) and shape[place] != size:
            place += 1
        if place == len(shape):
            return NamedSharding(parameter.mesh, PartitionSpec())
        axes.append(parameter.spec[place] if size > 1 else None)
        place += size > 1
    return NamedSharding(parameter.mesh, PartitionSpec(*axes))


def replicated_axes(mesh: Mesh, names: Sequence[str], shape: Sequence[int]) -> list[str]:
    """The logical axes of a parameter that the mesh should shard but cannot divide."""
    return [
        name
        for name, size in zip(names, shape, strict=True)
        if _rule(PARAMETERS, name) and _fit(mesh.shape, name, size) is None
    ]


def _fit(sizes: Mapping[str, int], name: str, size: int) -> tuple[str, ...] | None:
    axes = _rule(PARAMETERS, name)
    n = prod(sizes[axis] for axis in axes)
    if size % n == 0:
        return axes or None
    if name in MAY_STAY_WHOLE:
        return None
    raise UserError(
        f"--config.{CONFIG_KEYS.get(name, name)}={size} is not divisible by "
        f"{n} ({', '.join(f'--config.parallel.mesh.{axis}' for axis in axes)})"
    )


def _rule(rules: Rules, name: str) -> tuple[str, ...]:
    if name not in rules:
        raise KeyError(f"no sharding rule for logical axis {name!r}")
    return rules[name]


def batch_sharding(mesh: Mesh, shapes: Mapping[str, Sequence[int]]) -> dict[str, NamedSharding]:
    """The shardings of the [steps, B, …] arrays of batches with these [B, …] shapes, by name.

    The dimension after the rows lies over `context` where it divides it: it is a length, or of
    arrays whose place makes no difference, such as the masked positions of a row.
    """

    def spec(shape: Sequence[int]) -> PartitionSpec:
        has_length = len(shape) > 1 and shape[1] % mesh.shape[LENGTH_AXIS] == 0
        return PartitionSpec(None, ROW_AXES, *((LENGTH_AXIS,) if has_length else ()))

    return {name: NamedSharding(mesh, spec(shape)) for name, shape in shapes.items()}


@dataclass(frozen=True)
class ShardingContext:
    """The mesh of a step and the rules for its activations."""

    mesh: Mesh
    rules: Rules

    def spec(self, names: Sequence[str]) -> PartitionSpec:
        return PartitionSpec(*(_rule(self.rules, name) or None for name in names))

    def shards(self, name: str) -> int:
        return prod(self.mesh.shape[axis] for axis in _rule(self.rules, name))


_placement: ContextVar[ShardingContext | None] = ContextVar("placement", default=None)


@contextlib.contextmanager
def activations_on(mesh: Mesh, sequence: bool = False) -> Iterator[None]:
    """While a step is traced inside this context, `constrain` shards over `mesh`.

    With `sequence` the rules are those of sequence parallelism.
    """
    token = _placement.set(ShardingContext(mesh, ACTIVATIONS | (SEQUENCE if sequence else {})))
    try:
        yield
    finally:
        _placement.reset(token)


def on_mesh() -> bool:
    """Whether a step for a mesh is being traced; decoding runs on none."""
    return current_mesh() is not None


def shards(name: str) -> int:
    """Into how many parts the mesh cuts this dimension of activations; no mesh, one."""
    placement = _placement.get()
    return placement.shards(name) if placement else 1


def sharding(*names: str) -> NamedSharding:
    """Where an activation with these dimensions lies. Needs a mesh."""
    placement = _placement.get()
    assert placement is not None
    return NamedSharding(placement.mesh, placement.spec(names))


def current_mesh() -> Mesh | None:
    """The mesh of the step that is being traced."""
    placement = _placement.get()
    return placement.mesh if placement else None


def divided(rules: Rules, name: str) -> tuple[str, ...]:
    """The axes of the current mesh over which a logical axis is divided, () without a mesh."""
    axes, mesh = _rule(rules, name), current_mesh()
    return tuple(axis for axis in axes if mesh is not None and mesh.shape[axis] > 1)


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """`x` with its dimensions sharded as the activation table says; no mesh, no change."""
    for name in names:
        _rule(ACTIVATIONS, name)
    if not on_mesh():
        return x
    return jax.lax.with_sharding_constraint(x, sharding(*names))


def shard_mapped(
    function: Callable[..., jax.Array], arguments: Sequence[Any], names: Sequence[Any]
) -> jax.Array:
    """`function` of `arguments`, run by every device on its own parts of them.

    `names` are those of each argument's dimensions, or else a tree of PartitionSpecs; the result
    has those of the first argument. For kernels that the compiler cannot partition, and those
    that send parts from device to device themselves. Needs a mesh.
    """
    placement = _placement.get()
    assert placement is not None
    specs = [placement.spec(n) if isinstance(n, tuple) else n for n in names]
    # The check of what varies over which axis knows neither custom gradients nor Pallas.
    return jax.shard_map(
        function,
        mesh=placement.mesh,
        in_specs=tuple(specs),
        out_specs=specs[0],
        check_vma=False,
    )(*arguments)
