"""Schema of the configuration: every key with its default, meaning and range."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from lm.config.model_keys import MODEL_KEYS
from lm.config.registries import REGISTRIES
from lm.config.registry import Key
from lm.config.run_keys import RUN_KEYS

COMMON_KEYS: dict[str, Key] = {
    "seed": Key(0, "Seed of initialisation, dropout and data order.", low=0, high=2**31 - 1),
    "paper": Key("", "Name of the published model that this configuration reproduces."),
    **MODEL_KEYS,
    **RUN_KEYS,
}


class Schema(Mapping[str, Key]):
    """Keys by dotted path: those in common, and the options of what is registered at the moment."""

    def __init__(self) -> None:
        self._keys: dict[str, Key] = {}
        self._versions: tuple[int, ...] = ()

    def _current(self) -> dict[str, Key]:
        versions = tuple(registry.version for registry in REGISTRIES)
        if versions != self._versions or not self._keys:
            self._keys, self._versions = _all_keys(), versions
        return self._keys

    def __getitem__(self, path: str) -> Key:
        return self._current()[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._current())

    def __len__(self) -> int:
        return len(self._current())

    def is_section(self, path: str) -> bool:
        """Return whether keys lie below `path`."""
        return any(known.startswith(f"{path}.") for known in self)

    def unused_options(self, config: Mapping[str, Any]) -> dict[str, Key]:
        """Return the options of plug-ins that a configuration does not use."""
        return {
            path: key
            for registry in REGISTRIES
            for name, entry in registry.entries.items()
            if entry.plugin and not registry.is_used(name, config)
            for path, key in entry.keys_added().items()
        }


def _all_keys() -> dict[str, Key]:
    sections: dict[str, dict[str, Key]] = {}
    added = {path: key for registry in REGISTRIES for path, key in registry.keys_added().items()}
    for path, key in {**COMMON_KEYS, **added}.items():
        sections.setdefault(path.partition(".")[0], {})[path] = key
    keys = {path: key for section in sections.values() for path, key in section.items()}
    for registry in REGISTRIES:
        if registry.is_choice:
            (path,) = registry.keys_of_names
            keys[path] = dataclasses.replace(keys[path], choices=tuple(registry))
    return keys


SCHEMA = Schema()
