"""Model and parameters of decoding, made once from those of training.

A step of decoding reads every weight for a few tokens: nothing may be copied or converted in it.
So layers are unstacked, and kernels are cast to the compute dtype or kept in int8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.experiment import Experiment
from lm.models.int8_kernel import Int8Kernel
from lm.models.parameter_groups import layer_numbers, layer_path
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Kind, Params, flat, nested

CAST = frozenset({Kind.MATRIX, Kind.HEAD, Kind.EMBEDDING})  # the model rounds them itself
QUANTIZED = frozenset({Kind.MATRIX, Kind.HEAD})


def prepare(experiment: Experiment, params: Params) -> tuple[Experiment, Params]:
    """Return an experiment and parameters for decoding by `--config.decode.weights` and `cache`.

    What was prepared already is returned as it is.

    Args:
        experiment: experiment on a mesh.
        params: its parameters, or their shapes with shardings.
    """
    model, weights = experiment.model, experiment.config.decode.weights
    config: Any = model.config  # type: ignore[attr-defined]
    if _is_unrolled(config):
        return experiment, params
    dtype = config.dtype if weights in ("auto", "int8") else jnp.dtype(weights)
    changes: dict[str, Any] = {"dtype": dtype}
    if isinstance(config, TransformerConfig):
        changes["cache_dtype"] = _cache_dtype(experiment, dtype)

    def store(path: str, x: jax.Array) -> Any:
        info = experiment.param_infos.get(path)
        if info is None or info.role.kind not in CAST or isinstance(x, Int8Kernel):
            return x
        if weights == "int8" and info.role.kind in QUANTIZED:
            return Int8Kernel.quantize(x, info, dtype)
        return x.astype(dtype)

    model = model.clone(config=replace(config, **changes))
    model, params = unroll(model, params, store)
    return replace(experiment, model=model), params


def _cache_dtype(experiment: Experiment, dtype: jnp.dtype) -> str:
    """Return the dtype of the key/value cache, the compute dtype by default.

    XLA's CPU backend converts a whole bfloat16 cache where a token is written, and has no fast
    product of one bfloat16 vector: there it is float32.
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
    """Return a model whose layers are not stacked, and its parameters.

    Layers that are on different devices (pipeline stages) stay stacked, as do those of an LSTM.

    Args:
        model: model; one that is unrolled already is returned as it is.
        params: its parameters, or their shapes with shardings.
        store: returns a parameter as it is kept, given its path and, of a stack, one layer of it.
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
