"""Which parameters a model has: shape and logical axes of each, before there are any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from lm.interop.family import Family
from lm.interop.tensor_mapping import Shape
from lm.models.encoder import Encoder
from lm.models.encoder_decoder import EncoderDecoder
from lm.optim.parameter_groups import flat
from lm.parallel.sharding import parameter_sharding

OF_TASKS = ("pooler", "sentence_head", "classifier", "span_head")  # no model needs them


@dataclass(frozen=True)
class Parameter:
    """Its shape, and the logical names of its axes."""

    shape: Shape
    axes: tuple[str, ...]

    def sharding(self, mesh: Mesh | None) -> Sharding:
        """On a mesh by the rules of training; without one, on the first device."""
        if mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return parameter_sharding(mesh, self.axes, self.shape)


def parameters(family: Family, model: nn.Module, heads: frozenset[str]) -> dict[str, Parameter]:
    """By path, those of the stack and of the named heads."""
    shapes = flat(jax.eval_shape(lambda: _initialise(model))["params"])
    of_head = {m: name for name, head in family.heads.items() for m in head.modules}
    found = {}
    for path, leaf in shapes.items():
        module = path.partition("/")[0]
        if of_head[module] in heads if module in of_head else module not in OF_TASKS:
            found[path] = Parameter(leaf.value.shape, tuple(leaf.names))
    return found


def _initialise(model: nn.Module) -> Any:
    tokens_BL = jnp.zeros((1, 1), jnp.int32)
    key = jax.random.key(0)
    if isinstance(model, EncoderDecoder):
        return model.init(key, tokens_BL, tokens_BL)
    if isinstance(model, Encoder):
        return model.init(key, tokens_BL, method=_all_heads)
    return model.init(key, tokens_BL)


def _all_heads(model: Encoder, tokens_BL: jax.Array) -> list[jax.Array]:
    x_BLD = model.hidden(tokens_BL)
    x_BD = model.pooled(x_BLD, jnp.ones_like(tokens_BL))
    of_tokens = [model.logits(x_BLD), model.spans(x_BLD)]
    return [*of_tokens, model.next_sentence(x_BD), model.classify(x_BD)]
