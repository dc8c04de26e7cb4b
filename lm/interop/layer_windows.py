"""Which layers have a window: `layer_types` of theirs, `window` and `global_every` of ours."""

from __future__ import annotations

from collections.abc import Sequence

from lm.interop.family import UnsupportedConfig, Values, require
from lm.models.transformer_config import TransformerConfig, global_layers

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def layer_types(n_layers: int, window: int, global_every: int) -> list[str]:
    """Their word for each layer."""
    is_global_N = global_layers(n_layers, window, global_every)
    return [GLOBAL if is_global else LOCAL for is_global in is_global_N]


def types_of(config: TransformerConfig) -> list[str]:
    return layer_types(config.n_layers, config.window, config.global_every)


def read_windows(theirs: Values, types: Sequence[str]) -> Values:
    """`window` and `global_every` of layers of these types, `sliding_window` tokens wide."""
    if LOCAL not in types:
        window = every = 0
    else:
        window = require(theirs, "sliding_window")
        every = types.index(GLOBAL) + 1 if GLOBAL in types else 0
    if list(types) != layer_types(require(theirs, "num_hidden_layers"), window, every):
        raise UnsupportedConfig("config.json: layer_types are not local ones and each n-th global")
    return {"window": window, "global_every": every}
