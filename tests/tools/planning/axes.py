"""Where an array lies, in words."""

from jax.sharding import NamedSharding


def axes_of(sharding: NamedSharding) -> str:
    """The mesh axes of more than one device that divide each dimension, as "- fsdp tensor"."""
    sizes = sharding.mesh.shape
    dimensions = [axes if isinstance(axes, tuple) else (axes,) for axes in sharding.spec]
    return " ".join(
        ",".join(axis for axis in axes if axis and sizes[axis] > 1) or "-" for axes in dimensions
    )
