"""Model and parameters for decoding, converted once from those of training.

A decoding step reads every weight for only a few tokens, so nothing may be copied or converted in
it: layers are unstacked, and kernels and tables are cast to the compute dtype or quantized to 8 or
4 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.ahead_modules import without_ahead
from lm.models.frozen import without_frozen
from lm.models.parameter_groups import layer_numbers, layer_path
from lm.models.quantized_kernel import (
    BITS,
    QUANTIZED,
    QuantizedKernel,
    round_params,
    summed_axes,
)
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import ParamInfo, Params, flat, nested
from lm.parallel.mesh import parameter_axes
from lm.runs.checkpoints import Log


def prepare(experiment: Experiment, params: Params) -> tuple[Experiment, Params]:
    """Convert an experiment and parameters for decoding (`--config.decode.weights` and `cache`).

    Already converted ones are returned unchanged.

    Args:
        experiment: experiment on a mesh.
        params: parameters, or their shapes with shardings.
    """
    model, weights = experiment.model, experiment.config.decode.weights
    config: Any = model.config  # type: ignore[attr-defined]
    if _is_unrolled(config):
        return experiment, params
    dtype = config.dtype if weights in ("auto", *BITS) else jnp.dtype(weights)
    changes: dict[str, Any] = {"dtype": dtype}
    if isinstance(config, TransformerConfig):
        changes["cache_dtype"] = _cache_dtype(experiment, dtype)

    def store(path: str, x: jax.Array) -> Any:
        info = experiment.param_infos.get(path)
        if info is None or info.role.kind not in QUANTIZED or isinstance(x, QuantizedKernel):
            return x  # the model keeps it in float32 too
        if weights in BITS:
            kernel = QuantizedKernel.quantize(x, info, dtype, BITS[weights])
            return _sharded_alike(kernel, info, experiment.mesh)
        return x.astype(dtype)

    model = model.clone(config=replace(config, **changes))
    model, params = unroll(model, without_ahead(params), store)
    return replace(experiment, model=model), params


def round_weights(experiment: Experiment, params: Params, log: Log) -> Params:
    """Return training parameters rounded by `--config.decode.weights`, in float32.

    So an evaluation measures the loss of the weights used in decoding.

    Args:
        experiment: experiment on a mesh.
        params: parameters; those of frozen models are not rounded.
        log: called with the size of quantized weights.
    """
    weights, infos = experiment.config.decode.weights, experiment.param_infos
    if weights == "auto":
        return params
    if weights in BITS:
        kept, of_bfloat16 = weight_bytes(experiment, without_frozen(params))
        ratio = kept / of_bfloat16
        log(f"{weights} weights: {kept:,} bytes, {ratio:.3f} of the {of_bfloat16:,} of bfloat16")

    leaves = flat(params)
    shardings = {path: x.sharding for path, x in leaves.items()}
    rounded = jax.jit(lambda leaves: round_params(leaves, infos, weights), out_shardings=shardings)
    return nested(rounded(leaves))


def weight_bytes(experiment: Experiment, params: Params) -> tuple[int, int]:
    """Return the bytes of the weights as decoding reads them, and in bfloat16.

    Args:
        experiment: experiment on a mesh.
        params: parameters, or their shapes with shardings.
    """
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    kept = jax.tree.leaves(prepare(experiment, shapes)[1])
    of_bfloat16 = sum(2 * x.size for x in jax.tree.leaves(shapes))
    return sum(x.size * x.dtype.itemsize for x in kept), of_bfloat16


def _sharded_alike(kernel: QuantizedKernel, info: ParamInfo, mesh: Mesh) -> QuantizedKernel:
    """Shard values and scales like the kernel that they replace, where the mesh divides them."""
    names = info.axes[-len(kernel.shape) :]
    first, end = summed_axes(len(names), info)

    def sharded(x: jax.Array, summed: Sequence[str]) -> jax.Array:
        axes = zip((*names[:first], *summed, *names[end:]), x.shape, strict=True)
        spec = [_axes_that_divide(mesh, name, size) for name, size in axes]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    if kernel.summed:  # one axis of groups; each group stays on one device
        alike = [names[first], "one"]
        return replace(
            kernel, values=sharded(kernel.values, alike), scale=sharded(kernel.scale, alike)
        )
    ones = ["one"] * (end - first)
    return replace(
        kernel, values=sharded(kernel.values, names[first:end]), scale=sharded(kernel.scale, ones)
    )


def _axes_that_divide(mesh: Mesh, name: str, size: int) -> tuple[str, ...] | None:
    try:
        return parameter_axes(mesh.shape, name, size)
    except UserError:
        return None


def _cache_dtype(experiment: Experiment, dtype: jnp.dtype) -> str:
    """Return the dtype of the key/value cache; by default the compute dtype.

    XLA's CPU backend converts a whole bfloat16 cache for each written token, and has no fast
    product with a single bfloat16 vector: there it is float32.
    """
    asked = experiment.config.decode.cache
    if asked != "auto":
        return asked
    on_cpu = experiment.mesh.devices.flat[0].platform == "cpu"
    return "float32" if on_cpu else str(jnp.dtype(dtype))


def _is_unrolled(config: Any) -> bool:
    return isinstance(config, TransformerConfig) and config.unrolled


def unroll(
    model: nn.Module, params: Params, store: Callable[[str, jax.Array], Any] = lambda path, x: x
) -> tuple[nn.Module, Params]:
    """Return a model with unstacked layers, and its parameters.

    Layers on different devices (pipeline stages), and LSTM layers, stay stacked.

    Args:
        model: model; an unrolled one is returned unchanged.
        params: parameters, or their shapes with shardings.
        store: converts a parameter, given its path and (for a stack) one layer.
    """
    config: Any = model.config  # type: ignore[attr-defined]
    if _is_unrolled(config):
        return model, params
    leaves = flat(params)
    unrolls = isinstance(config, TransformerConfig)
    unrolls &= not any(_is_in_stages(path, x) for path, x in leaves.items())
    if isinstance(config, TransformerConfig):
        config = replace(config, remat="none", scan_unroll=1, unrolled=unrolls)

    def stored(leaves: dict[str, jax.Array]) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for path, x in leaves.items():
            numbers = layer_numbers(path, x)
            if unrolls and numbers is not None and numbers.ndim:
                kept |= {layer_path(path, n): store(path, x[i]) for i, n in enumerate(numbers)}
            else:
                kept[path] = store(path, x)
        return kept

    made = jax.jit(stored)
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves.values()):
        return model.clone(config=config), nested(made(leaves))
    shardings = made.lower(leaves).compile().output_shardings
    shapes = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(stored, leaves),
        shardings,
    )
    return model.clone(config=config), nested(shapes)


def _is_in_stages(path: str, x: jax.Array) -> bool:
    """Return whether the layers of a stacked parameter are on different devices."""
    numbers = layer_numbers(path, x)
    sharding = getattr(x, "sharding", None)
    if numbers is None or not numbers.ndim or sharding is None:
        return False
    return sharding.shard_shape(x.shape)[0] < x.shape[0]
