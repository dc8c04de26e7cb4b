"""Parameter groups: patterns of paths, layer numbers, and which parameters train.

A parameter's path is "stack/layers/attention/query/kernel". The layers of a stack are one array,
but patterns can also match a single layer: "stack/layers/0/attention/query/kernel". Where layers
differ, "stack/layers/1_of_2/…" holds every second one: 1, 3, …; the layers of
"stack/layers_3/…" start with number 3; and "stack/layers/0/…" may be a layer that is not stacked.
Shape letters: N layers; groups are numpy arrays, [N] for stacked layers and [] for others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.config.patterns import compile_patterns
from lm.errors import UserError
from lm.models.frozen import is_frozen
from lm.models.variables import LORA, flat, nested

Tree = Any


@dataclass(frozen=True)
class TrainableMask:
    """Parameters that train, named by patterns of paths.

    Attributes:
        freeze: patterns of parameters that do not train.
        with_lora: patterns of parameters that train in addition to low-rank factors, if there are
            any; otherwise all that are not frozen train.
    """

    freeze: str = ""
    with_lora: str = ""

    @property
    def has_patterns(self) -> bool:
        """True if patterns name parameters; otherwise low-rank factors decide."""
        return bool(self.freeze or self.with_lora)

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """Split parameters into those that train and those that are frozen, as nested dicts.

        A stack with only some layers frozen is among those that train.

        Raises:
            UserError: a pattern matches nothing, or nothing trains.
        """
        groups = self.groups(params)
        if not any(group.any() for group in groups.values()):
            raise UserError("--config.optimizer.freeze leaves no parameter to train")
        trained: dict[str, Any] = {}
        frozen: dict[str, Any] = {}
        for path, leaf in flat(params).items():
            (trained if groups[path].any() else frozen)[path] = leaf
        return nested(trained), nested(frozen)

    def join(self, trained: Tree, frozen: Tree) -> Tree:
        """Join the two results of `split`; no gradient flows into frozen layers."""
        params = flat(trained) | flat(frozen)
        for path, group in self.groups(nested(params)).items():
            if group.any() and not group.all():
                leaf = params[path]
                params[path] = jnp.where(along(group, leaf), leaf, jax.lax.stop_gradient(leaf))
        return nested(params)

    def groups(self, params: Tree, strict: bool = True) -> dict[str, np.ndarray]:
        """Return whether each parameter, or each layer of it, trains.

        Args:
            params: nested parameters.
            strict: as in `matching`.
        """
        leaves = flat(params)
        frozen = matching("optimizer.freeze", self.freeze, leaves, strict)
        trains = {path: ~group & (not is_frozen(path)) for path, group in frozen.items()}
        if LORA not in params:
            return trains
        beside = matching("lora.train", self.with_lora, leaves, strict)
        return {
            path: group & (beside[path] | path.startswith(f"{LORA}/"))
            for path, group in trains.items()
        }


def matching(
    key: str, text: str, leaves: Mapping[str, Any], strict: bool = True
) -> dict[str, np.ndarray]:
    """Return whether any pattern is found in the path of each parameter, or each layer of it.

    Args:
        key: configuration key of the patterns, for messages.
        text: regular expressions, separated by commas.
        leaves: parameters by path.
        strict: raise an error for a pattern that matches no path.

    Raises:
        UserError: see `strict`.
    """
    groups = {
        path: np.zeros(_shape(layer_numbers(path, leaf)), bool) for path, leaf in leaves.items()
    }
    for pattern in compile_patterns(key, text):
        hits = {path: _hits(pattern, path, leaf) for path, leaf in leaves.items()}
        if strict and not any(group.any() for group in hits.values()):
            raise UserError(
                f"--config.{key}: {pattern.pattern!r} matches no parameter; `lm params` lists them"
            )
        groups = {path: groups[path] | group for path, group in hits.items()}
    return groups


# "layers/" or "layers_{first}/"; then "{i}_of_{n}/", or the number of a layer that is not stacked.
_LAYERS = re.compile(r"(?<![^/])layers(?:_(\d+))?/(?:(\d+)_of_(\d+)/|(\d+)/)?")


def layer_numbers(path: str, leaf: Any) -> np.ndarray | None:
    """Return the layer numbers of a parameter: [N] if stacked, [] if not, None outside a stack."""
    found = _LAYERS.search(path)
    if not found:
        return None
    if found[4]:
        return np.asarray(int(found[4]))
    first, step = int(found[1] or 0) + int(found[2] or 0), int(found[3] or 1)
    return first + step * np.arange(leaf.shape[0])


def layer_path(path: str, number: int) -> str:
    """Return the path of one layer of a stacked parameter, as if it were not stacked."""
    return _LAYERS.sub(f"layers/{number}/", path, count=1)


def _shape(layers: np.ndarray | None) -> tuple[int, ...]:
    return () if layers is None else layers.shape


def stack_of(path: str) -> str:
    """Return the part of a path before its layers, the same for all parameters of a stack."""
    return _LAYERS.split(path, maxsplit=1)[0]


def _hits(pattern: re.Pattern, path: str, leaf: Any) -> np.ndarray:
    layers = layer_numbers(path, leaf)
    if pattern.search(path) or layers is None or not layers.ndim:
        return np.full(_shape(layers), bool(pattern.search(path)))
    names = (layer_path(path, i) for i in layers)
    return np.array([bool(pattern.search(name)) for name in names])


def along(group: np.ndarray, leaf: Any) -> np.ndarray:
    """Reshape a group [N] or [] so that it broadcasts along the first axis of a parameter."""
    return group.reshape(*group.shape, *(1,) * (leaf.ndim - group.ndim))
