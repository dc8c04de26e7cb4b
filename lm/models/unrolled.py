"""Unrolled stack for decoding: each layer has its own parameters and cache.

Slicing stacked parameters or caches would copy them in every step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax

from lm.models.cache import cache_indices
from lm.models.transformer import Block, BlockOutput, LayerInputs, ScanCarry, StackInputs
from lm.models.transformer_config import LayerType, TransformerConfig


class CachedBlocks(nn.Module):
    """Blocks of an unrolled stack with its cache; parameters as in `Blocks`.

    The cache of a mixer is a tuple over its layers, and so are the keys and values of
    cross-attention; neither has a layer axis (`lm/models/cache.py`).
    """

    config: TransformerConfig
    deterministic: bool
    layer_types: tuple[LayerType, ...]
    names: tuple[str, ...]

    @nn.compact
    def __call__(self, carry: ScanCarry, inputs: StackInputs, layers: LayerInputs) -> BlockOutput:
        x_BLW, caches = carry
        assert caches is not None
        parts: dict[str, list[Any]] = {mixer: list(own) for mixer, own in caches.items()}
        sources: list[Any] = []
        numbers = cache_indices(self.layer_types)
        for i, (kind, name) in enumerate(zip(self.layer_types, self.names, strict=True)):
            of_mixer, number = parts[kind.mixer], numbers[i]
            source = None if layers.source is None else layers.source[i]
            own = replace(layers, cache_index=(), source=None)
            layer = replace(jax.tree.map(lambda x, i=i: x[i], own), source=source)
            block: Any = Block(self.config, self.deterministic, kind, name=name)
            (x_BLW, after), source = block((x_BLW, {kind.mixer: of_mixer[number]}), inputs, layer)
            of_mixer[number] = after[kind.mixer]
            sources.append(source)
        made = None if sources[0] is None else tuple(sources)
        return (x_BLW, {mixer: tuple(own) for mixer, own in parts.items()}), made
