"""Parameters of an imported model: shapes, logical axes, and sharded loading."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from lm.interop.family import OUTPUT, Family
from lm.interop.tensor_mapping import Block, Shape
from lm.models.decoder import Decoder
from lm.models.encoder import Encoder
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.model_state import state_axes
from lm.models.variables import MODEL_STATE, flat, param_infos
from lm.parallel.mesh import parameter_sharding

_ALIGNMENT = 64  # bytes; aligned like this, JAX uses a NumPy array on CPU without a copy


@dataclass(frozen=True)
class ParameterSpec:
    """Shape and logical axes of a parameter."""

    shape: Shape
    axes: tuple[str, ...]

    def sharding(self, mesh: Mesh | None) -> Sharding:
        """Return the sharding for training on a mesh, or the first device without one."""
        if mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return parameter_sharding(mesh, self.axes, self.shape)


def parameter_specs(
    family: Family, model: nn.Module, heads: frozenset[str]
) -> dict[str, ParameterSpec]:
    """Return the parameters of the stack and the named heads, and model state, by path."""
    variables = jax.eval_shape(lambda: initialize(model))
    boxed, boxed_state = variables["params"], variables.get(MODEL_STATE, {})
    infos = param_infos(boxed)
    optional = {m for head in family.heads.values() for m in head.modules}
    chosen = {m for name in heads for m in family.heads[name].modules}
    if any(family.heads[name].replaces_output for name in heads):
        optional.add(OUTPUT)
    found = {}
    for path, leaf in flat(nn.meta.unbox(boxed)).items():
        module = path.partition("/")[0]
        is_optional = infos[path].role.part in ("task", "pretraining")
        if module in chosen if module in optional else not is_optional:
            found[path] = ParameterSpec(leaf.shape, infos[path].axes)
    axes, state = state_axes(boxed_state, 1), flat(nn.meta.unbox(boxed_state))
    specs = {path: ParameterSpec(leaf.shape, axes[path]) for path, leaf in state.items()}
    return found | {f"{MODEL_STATE}/{path}": spec for path, spec in specs.items()}


def initialize(model: nn.Module) -> Any:
    """Initialize a model with all of its heads, to be traced for shapes, roles and axes."""
    tokens_BL = jnp.zeros((1, 1), jnp.int32)
    key = jax.random.key(0)
    if isinstance(model, EncoderDecoder):
        n_mels = model.config.n_mels
        if model.config.pooling == "shifted":
            return model.init(key, tokens_BL, method=_call_pair_heads)
        return model.init(key, jnp.zeros((1, 2, n_mels)) if n_mels else tokens_BL, tokens_BL)
    if isinstance(model, Encoder):
        return model.init(key, tokens_BL, method=_call_all_heads)
    return model.init(key, tokens_BL, method=_call_decoder_heads)


def _call_all_heads(model: Encoder, tokens_BL: jax.Array) -> list[jax.Array]:
    x_BLD = model.hidden(tokens_BL)
    x_BD = model.pooled(x_BLD, jnp.ones_like(tokens_BL))
    of_tokens = [model.logits(x_BLD), model.spans(x_BLD), model.replaced(x_BLD)]
    return [*of_tokens, model.next_sentence(x_BD), model.classify(x_BD)]


def _call_decoder_heads(model: Decoder, tokens_BL: jax.Array) -> list[jax.Array]:
    x_BLD = model.hidden(tokens_BL)
    x_BD = model.pooled(x_BLD, jnp.ones_like(tokens_BL))
    return [model.logits(x_BLD), model.spans(x_BLD), model.classify(x_BD)]


def _call_pair_heads(model: EncoderDecoder, tokens_BL: jax.Array) -> list[jax.Array]:
    x_BLD = model.hidden(tokens_BL)
    x_BD = model.pooled(x_BLD, jnp.ones_like(tokens_BL))
    return [model.logits(x_BLD), model.spans(x_BLD), model.classify(x_BD)]


def zeros(shape: Shape, sharding: Sharding) -> jax.Array:
    """Return a sharded parameter of zeros, float32."""
    return load_sharded(shape, sharding, [((0,) * len(shape), np.zeros(shape, np.float32))])


def load_sharded(shape: Shape, sharding: Sharding, blocks: Iterable[Block]) -> jax.Array:
    """Assemble a sharded float32 array from blocks, without a full copy on the host.

    Args:
        shape: global shape.
        sharding: target sharding.
        blocks: start indices and values; each block is read once and copied to the local shards
            that it overlaps.
    """
    bounds_of = {
        device: tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
        if index is not None
    }
    shards = {bounds: _aligned_empty(bounds) for bounds in set(bounds_of.values())}
    for starts, values in blocks:
        for bounds, shard in shards.items():
            _copy_overlap(starts, values, bounds, shard)
    arrays = [jax.device_put(shards[bounds], device) for device, bounds in bounds_of.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _aligned_empty(bounds: Iterable[tuple[int, int]]) -> np.ndarray:
    shape = [stop - start for start, stop in bounds]
    n_bytes = 4 * prod(shape)
    buffer = np.empty(n_bytes + _ALIGNMENT, np.uint8)
    first = -buffer.ctypes.data % _ALIGNMENT
    return buffer[first : first + n_bytes].view(np.float32).reshape(shape)


def _copy_overlap(
    starts: Shape, values: np.ndarray, bounds: tuple[tuple[int, int], ...], shard: np.ndarray
) -> None:
    target, source = [], []
    for begin, size, (low, high) in zip(starts, values.shape, bounds, strict=True):
        first, last = max(begin, low), min(begin + size, high)
        if first >= last:
            return
        target.append(slice(first - low, last - low))
        source.append(slice(first - begin, last - begin))
    shard[tuple(target)] = values[tuple(source)]
