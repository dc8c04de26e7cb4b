"""Shardings as text."""

from jax.sharding import NamedSharding


def axes_of(sharding: NamedSharding) -> str:
    """Return the mesh axes above 1 that shard each dimension, as "- fsdp tensor"."""
    sizes = sharding.mesh.shape
    dimensions = [axes if isinstance(axes, tuple) else (axes,) for axes in sharding.spec]
    return " ".join(
        ",".join(axis for axis in axes if axis and sizes[axis] > 1) or "-" for axes in dimensions
    )
