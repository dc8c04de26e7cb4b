"""Device mesh: named axes, process roles, and sharding rules.

Axes are ordered from the outermost (slowest network). Models name the logical axes of their arrays
("embed", "heads", …) and know no mesh; rules map them to mesh axes. A name without a rule is an
error, never silent replication. While a step is traced inside `use_mesh`, `constrain` and the
functions after it read the mesh from the context. Random draws of a row do not depend on where it
is computed.

Shape letters: B batch, L length, V vocabulary, D model.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.extend.random import define_prng_impl
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.errors import UserError

if TYPE_CHECKING:
    from lm.parallel.pipeline import PipelineSchedule

AXES = ("slice", "stage", "data", "fsdp", "expert", "context", "tensor")
PRESETS = {"data": {"data": -1}, "fsdp": {"fsdp": -1}}


def axis_sizes(preset: str, sizes: Mapping[str, int], n_devices: int) -> dict[str, int]:
    """Return the sizes of all mesh axes.

    Args:
        preset: a key of `PRESETS`, or "custom" for `sizes`.
        sizes: axis sizes; one of them may be -1 for all remaining devices.
        n_devices: number of devices.

    Returns:
        Sizes by axis, in the order of `AXES`.

    Raises:
        UserError: the sizes do not multiply to `n_devices`.
    """
    requested = dict.fromkeys(AXES, 1) | dict(sizes if preset == "custom" else PRESETS[preset])
    fixed = prod(size for size in requested.values() if size != -1)
    resolved = {
        axis: max(n_devices // fixed, 1) if size == -1 else size for axis, size in requested.items()
    }
    if prod(resolved.values()) != n_devices:
        shown = ", ".join(f"{axis}={size}" for axis, size in requested.items() if size != 1)
        raise UserError(
            f"--config.parallel.mesh ({shown or 'one device'}) does not divide {n_devices} devices"
        )
    return resolved


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """Build the mesh of all axes over `devices`.

    Axis "slice" crosses the slow network; the other axes stay inside a slice or host, along fast
    links where `mesh_utils` knows them.
    """
    inside = tuple(sizes[axis] for axis in AXES if axis != "slice")
    parts = [list(devices)]
    if len(devices) > 1:
        from lm.parallel.hosts import split_by_network

        parts = split_by_network(devices, sizes["slice"])
    grids = [
        mesh_utils.create_device_mesh(inside, part, allow_split_physical_axes=True)
        for part in parts
    ]
    return Mesh(np.stack(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))


# --- processes


def is_primary_host() -> bool:
    """Return whether this process writes the run's files (metrics, progress, reports)."""
    return jax.process_index() == 0


def print_on_primary_host(message: str) -> None:
    """Print a line on stderr, on the primary host only."""
    if is_primary_host():
        print(message, file=sys.stderr, flush=True)


def on_all_hosts(value: bool) -> bool:
    """Return whether `value` is true on every host."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(value)).all())


# --- sharding rules

Rules = dict[str, tuple[str, ...]]

PARAMETERS: Rules = {
    "layers": ("stage",),
    "embed": ("fsdp", "context"),
    "latent": ("fsdp", "context"),  # kernel inputs that are not the residual stream
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    # Replicated. "residual": outputs of a kernel that maps the residual stream to itself; "one":
    # the reduced axis of a scale that otherwise has its kernel's axes.
    **dict.fromkeys(("residual", "one", "positions", "types", "head_dim", "norm", "pooled"), ()),
    **dict.fromkeys(("classes", "lora_rank", "hidden", "gates", "router_inputs", "router"), ()),
    **dict.fromkeys(("taps", "mels"), ()),
}

BATCH_AXES = ("slice", "data", "fsdp", "expert")
# Outside the stack of layers, pipeline stages shard the batch too.
ROW_AXES = ("stage", *BATCH_AXES)
LENGTH_AXIS = "context"
ACTIVATIONS: Rules = {
    "batch": BATCH_AXES,
    "rows": ROW_AXES,
    "length": (LENGTH_AXIS,),
    "residual_length": (LENGTH_AXIS,),  # between the sublayers of a block
    "keys": (),  # length of keys and values that every query can reach
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

# Sequence parallelism: norms, dropout and residual sums are also sharded over the tensor axis
# (Korthikanti et al. 2022, §4.2.2).
SEQUENCE_PARALLEL: Rules = {"residual_length": (LENGTH_AXIS, "tensor")}

# Vocabulary sizes are arbitrary, key/value heads few and latents narrow: if the mesh does not
# divide such a dimension, it is replicated, and `mesh_rules.py` reports it.
MAY_REPLICATE = ("vocab", "kv_heads", "latent")

# Configuration key of each logical axis, for error messages.
CONFIG_KEYS = {
    "layers": "model.n_layers",
    "embed": "model.d_model",
    "heads": "model.n_heads",
    "mlp": "model.d_ff",
    "experts": "model.n_experts",
}


def parameter_sharding(mesh: Mesh, names: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """Return the sharding of a parameter from its logical axis names and shape.

    Raises:
        KeyError: a name has no rule.
        UserError: a dimension is not divisible by the mesh axes that shard it.
    """
    axes = (parameter_axes(mesh.shape, n, size) for n, size in zip(names, shape, strict=True))
    return NamedSharding(mesh, PartitionSpec(*axes))


def optimizer_state_sharding(
    parameter: NamedSharding, shape: Sequence[int], state_shape: Sequence[int]
) -> NamedSharding:
    """Return the sharding of an optimizer-state array.

    Dimensions that match the parameter's, with some left out or reduced to 1 (factored second
    moments), are sharded like them. Any other dimension, and those after it, are replicated.

    Args:
        parameter: sharding of the parameter.
        shape: shape of the parameter.
        state_shape: shape of the optimizer-state array.

    Returns:
        The sharding, on the mesh of the parameter.
    """
    axes, dimension = [], 0
    for size in state_shape:
        while size > 1 and dimension < len(shape) and shape[dimension] != size:
            dimension += 1
        found = size > 1 and dimension < len(shape)
        axes.append(parameter.spec[dimension] if found else None)
        dimension += size > 1
    return NamedSharding(parameter.mesh, PartitionSpec(*axes))


def parameter_axes(sizes: Mapping[str, int], name: str, size: int) -> tuple[str, ...] | None:
    """Return the mesh axes that shard a parameter's dimension; None if it is replicated."""
    axes = _rule(PARAMETERS, name)
    n = prod(sizes[axis] for axis in axes)
    if LENGTH_AXIS in axes and (size % n or sizes[LENGTH_AXIS] == 1):  # only if divisible
        axes = axes[:-1]
        n = prod(sizes[axis] for axis in axes)
    if size % n == 0:
        return axes or None
    if name in MAY_REPLICATE:
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
    """Return the shardings of the [steps, B, …] arrays of a batch, by name.

    The dimension after the rows is sharded over `context` if that divides it: it is a length, or
    an unordered set of positions such as the masked positions of a row.

    Args:
        mesh: mesh of the step.
        shapes: shapes [B, …] of the arrays by name.
    """

    def spec(shape: Sequence[int]) -> PartitionSpec:
        has_length = len(shape) > 1 and shape[1] % mesh.shape[LENGTH_AXIS] == 0
        return PartitionSpec(None, ROW_AXES, *((LENGTH_AXIS,) if has_length else ()))

    return {name: NamedSharding(mesh, spec(shape)) for name, shape in shapes.items()}


# --- the mesh of the step that is being traced


@dataclass(frozen=True)
class ShardingContext:
    """Mesh of a step, sharding rules for activations, and pipeline schedule if any."""

    mesh: Mesh
    rules: Rules
    pipeline: PipelineSchedule | None


_context: ContextVar[ShardingContext | None] = ContextVar("sharding", default=None)


@contextlib.contextmanager
def use_mesh(
    mesh: Mesh, sequence: bool = False, pipeline: PipelineSchedule | None = None
) -> Iterator[None]:
    """Trace the code inside on a mesh.

    Args:
        mesh: mesh over which `constrain` shards activations.
        sequence: use the rules of sequence parallelism.
        pipeline: schedule of stacks of layers, used if it has more than one stage.
    """
    rules = ACTIVATIONS | (SEQUENCE_PARALLEL if sequence else {})
    pipeline = pipeline if pipeline and pipeline.stages > 1 else None
    token = _context.set(ShardingContext(mesh, rules, pipeline))
    try:
        yield
    finally:
        _context.reset(token)


def current_mesh() -> Mesh | None:
    """Return the mesh of the step being traced; None in decoding."""
    context = _context.get()
    return context.mesh if context else None


def current_pipeline() -> PipelineSchedule | None:
    """Return the pipeline schedule of the step being traced; None with one stage."""
    context = _context.get()
    return context.pipeline if context else None


def count_shards(name: str) -> int:
    """Return the number of shards of a logical axis of activations; 1 without a mesh."""
    context = _context.get()
    return prod(context.mesh.shape[a] for a in _rule(context.rules, name)) if context else 1


def activation_sharding(*names: str) -> NamedSharding:
    """Return the sharding of an activation from its logical axes, inside `use_mesh`."""
    context = _context.get()
    assert context is not None
    axes = (_rule(context.rules, name) or None for name in names)
    return NamedSharding(context.mesh, PartitionSpec(*axes))


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """Constrain the sharding of an activation by its logical axes; no-op without a mesh."""
    for name in names:
        _rule(ACTIVATIONS, name)
    if current_mesh() is None:
        return x
    return lax.with_sharding_constraint(x, activation_sharding(*names))


# --- per-row random keys
#
# A draw of shape [B, …] from a per-row key gives the same values whether the batch is computed at
# once or in parts (microbatches, pipeline stages): the key of a part holds the indices of its rows.
# Models use it like any JAX key. It has four words: the two of a Threefry key, the index of the
# first row, and the row stride.


def per_row_key(key: jax.Array) -> jax.Array:
    """Return the per-row key of a full batch."""
    return wrap_row_key(key, jnp.array([0, 1], jnp.uint32))


def unpack_row_key(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Split the words of a per-row key into its Threefry key and its rows (first, stride)."""
    return jax.random.wrap_key_data(words[:2], impl="threefry2x32"), words[2:]


def _pack(plain: jax.Array, rows: jax.Array) -> jax.Array:
    data = jax.random.key_data(plain)
    return jnp.concatenate([data, jnp.broadcast_to(rows, data.shape)], axis=-1)


def wrap_row_key(plain: jax.Array, rows: jax.Array) -> jax.Array:
    """Build a per-row key from a Threefry key and its rows (first, stride)."""
    return jax.random.wrap_key_data(_pack(plain, rows), impl=_PER_ROW)


def _seed(seed: Any) -> jax.Array:
    return _pack(jax.random.key(seed, impl="threefry2x32"), jnp.array([0, 1], jnp.uint32))


def _split(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    plain, rows = unpack_row_key(words)
    return _pack(jax.random.split(plain, shape), rows)


def _fold_in(words: jax.Array, number: Any) -> jax.Array:
    plain, rows = unpack_row_key(words)
    return _pack(jax.random.fold_in(plain, number), rows)


def _random_bits(words: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    plain, (first, step) = unpack_row_key(words)
    dtype = jnp.dtype(f"uint{bit_width}")
    if not shape:
        return jax.random.bits(plain, (), dtype)
    rows = first + step * jnp.arange(shape[0], dtype=jnp.uint32)
    return jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(plain, row), shape[1:], dtype))(
        rows
    )


_PER_ROW: Any = define_prng_impl(
    key_shape=(4,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="by_row",
    tag="rows",
)
