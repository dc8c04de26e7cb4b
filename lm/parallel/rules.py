"""Which mesh axes shard which logical axis: one table for parameters, one for activations.

Models name the axes of their arrays ("embed", "heads", …) and know no mesh. A name without a
rule is an error, never silent replication.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from math import prod

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
}

BATCH_AXES = ("slice", "data", "fsdp")
# Outside the stack of layers, pipeline stages divide the batch too.
ROW_AXES = ("stage", *BATCH_AXES)
ACTIVATIONS: Rules = {
    "batch": BATCH_AXES,
    "rows": ROW_AXES,
    "length": (),
    "embed": (),
    "vocab": ("tensor",),
    "positions": (),
    "types": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "hidden": (),
}

# A vocabulary is whatever the tokenizer gives, and key/value heads are few: where the mesh does
# not divide them the dimension stays whole, and `kept_whole` reports it.
MAY_STAY_WHOLE = ("vocab", "kv_heads")

# The configuration key behind a logical axis, for error messages.
CONFIG_KEYS = {
    "layers": "model.n_layers",
    "embed": "model.d_model",
    "heads": "model.n_heads",
    "mlp": "model.d_ff",
}


def parameter_sharding(mesh: Mesh, names: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """The sharding of a parameter whose dimensions have these logical `names` and sizes."""
    return NamedSharding(
        mesh, PartitionSpec(*(_fit(mesh, n, s) for n, s in zip(names, shape, strict=True)))
    )


def statistic_sharding(
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


def kept_whole(mesh: Mesh, names: Sequence[str], shape: Sequence[int]) -> list[str]:
    """The logical axes of a parameter that the mesh should shard but cannot divide."""
    return [
        name
        for name, size in zip(names, shape, strict=True)
        if _rule(PARAMETERS, name) and _fit(mesh, name, size) is None
    ]


def _fit(mesh: Mesh, name: str, size: int) -> tuple[str, ...] | None:
    axes = _rule(PARAMETERS, name)
    parts = prod(mesh.shape[axis] for axis in axes)
    if size % parts == 0:
        return axes or None
    if name in MAY_STAY_WHOLE:
        return None
    raise UserError(
        f"config.{CONFIG_KEYS.get(name, name)}={size} is not divisible by "
        f"{parts} ({', '.join(f'parallel.mesh.{axis}' for axis in axes)})"
    )


def _rule(rules: Rules, name: str) -> tuple[str, ...]:
    if name not in rules:
        raise KeyError(f"no sharding rule for logical axis {name!r}")
    return rules[name]


_mesh: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


@contextlib.contextmanager
def activations_on(mesh: Mesh) -> Iterator[None]:
    """While a step is traced inside this context, `constrain` shards over `mesh`."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """`x` with its dimensions sharded as the activation table says; no mesh, no change."""
    axes = [_rule(ACTIVATIONS, name) or None for name in names]
    mesh = _mesh.get()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))
