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
    "layers": (),
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
ACTIVATIONS: Rules = {
    "batch": BATCH_AXES,
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
    "router": (),
}

# A vocabulary is whatever the tokenizer gives, and key/value heads are few: where the mesh does
# not divide them the dimension stays whole, and `kept_whole` reports it.
MAY_STAY_WHOLE = ("vocab", "kv_heads")

# The configuration key behind a logical axis, for error messages.
CONFIG_KEYS = {
    "embed": "model.d_model",
    "heads": "model.n_heads",
    "mlp": "model.d_ff",
    "experts": "model.n_experts",
}


def parameter_sharding(mesh: Mesh, names: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """The sharding of a parameter whose dimensions have these logical `names` and sizes."""
    return NamedSharding(
        mesh, PartitionSpec(*(_fit(mesh, n, s) for n, s in zip(names, shape, strict=True)))
    )


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


def current_mesh() -> Mesh | None:
    """The mesh of the step that is being traced."""
    return _mesh.get()


def divided(rules: Rules, name: str) -> tuple[str, ...]:
    """The axes of the current mesh over which a logical axis is divided, () without a mesh."""
    axes, mesh = _rule(rules, name), _mesh.get()
    return tuple(axis for axis in axes if mesh is not None and mesh.shape[axis] > 1)


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """`x` with its dimensions sharded as the activation table says; no mesh, no change."""
    axes = [_rule(ACTIVATIONS, name) or None for name in names]
    mesh = _mesh.get()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))
