"""Registries: from a name in the configuration to the class it stands for and the keys it adds.

One registry exists for each kind of thing that users add (`lm/config/registries.py`). An entry of
the library names its class as "module:attribute", so that reading a configuration imports no JAX;
a plug-in registers the class itself:

    @lm.objectives.register("copy", options=CopyOptions)
    class Copy(Objective): ...
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lm.config.key import Key
from lm.errors import UserError

T = TypeVar("T")


def option(default: Any, help: str, **limits: Any) -> Any:
    """Declare a field of an options dataclass: a configuration key.

    Args:
        default: default value; its type is the key's.
        help: one sentence for `lm config --keys`.
        **limits: the other fields of `Key`: low, high, choices, free.

    Returns:
        The dataclass field.
    """
    return dataclasses.field(default=default, metadata={"key": Key(default, help, **limits)})


def option_keys(options: type, section: str) -> dict[str, Key]:
    """Return the configuration keys that an options dataclass declares, by dotted path."""
    return {f"{section}.{f.name}": f.metadata["key"] for f in dataclasses.fields(options)}


@dataclass(frozen=True)
class Entry:
    """Entry of a registry.

    Attributes:
        target: the class or function, or "module:attribute".
        options: dataclass of the keys that the entry adds (fields by `option`), or None.
        section: section of the configuration that holds those keys.
        plugin: file that registered the entry, "" for those of the library.
    """

    target: Any
    options: type | None = None
    section: str = ""
    plugin: str = ""


class Registry(Mapping[str, Any]):
    """Mapping from names to classes or functions, resolved on first use."""

    def __init__(self, kind: str, key: str, section: str, entries: Mapping[str, Entry]):
        """Create the registry of one kind.

        Args:
            kind: noun for messages, such as "objective".
            key: configuration key whose value is a name of this registry.
            section: section that the options of plug-ins go into.
            entries: entries of the library.
        """
        self.kind, self.key, self.section = kind, key, section
        self.entries = dict(entries)

    def register(self, name: str, *, options: type | None = None) -> Callable[[T], T]:
        """Return a decorator that registers a class or function under `name`.

        Raises:
            UserError: the name is taken by another definition.
        """

        def add(target: T) -> T:
            code = importlib.import_module(target.__module__)  # type: ignore[attr-defined]
            plugin = getattr(code, "__file__", "") or ""
            old = self.entries.get(name)
            if old is not None and old.plugin != plugin:
                raise UserError(f"there is a {self.kind} {name!r} already; choose another name")
            self.entries[name] = Entry(target, options, self.section, plugin)
            return target

        return add

    def __getitem__(self, name: str) -> Any:
        if name not in self.entries:
            raise UserError(self.unknown(name))
        target = self.entries[name].target
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = getattr(importlib.import_module(module), attribute)
        return target

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def unknown(self, name: str) -> str:
        """Return the error message for an unknown name: the nearest one and all that are known."""
        near = difflib.get_close_matches(name, self.entries, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"unknown {self.kind} {name!r}{hint} (known: {', '.join(self.entries)})"

    def keys_added(self) -> dict[str, Key]:
        """Return the configuration keys that all entries declare, by dotted path."""
        found: dict[str, Key] = {}
        for entry in self.entries.values():
            if entry.options is not None:
                found |= option_keys(entry.options, entry.section)
        return found
