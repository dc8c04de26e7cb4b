"""Keys, registries and schema: map names in the configuration to classes and their options.

Each kind of extensible component has one registry (`lm/config/registries.py`). Library entries
name their class as "module:attribute", so reading a configuration imports no JAX.
A plug-in (a Python file that an experiment file imports) registers the class itself:

    from lm.config.registry import option
    from lm.config.registries import OBJECTIVES

    @dataclass(frozen=True)
    class CopyOptions:
        copy_length: int = option(3, "Tokens that are copied.", low=1)

    @OBJECTIVES.register("copy", options=CopyOptions)
    class Copy(Objective): ...
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lm.errors import UserError, nearest

T = TypeVar("T")
LARGEST_INTEGER = 2**28  # sizes and steps must fit 32-bit integers in compiled programs


@dataclass(frozen=True)
class Key:
    """Configuration key: default value, meaning and range.

    Attributes:
        default: default value; its type (int, float, bool, str or tuple of numbers) is the key's.
        help: one sentence for `lm config --keys`.
        low: smallest value, inclusive.
        high: largest value, inclusive.
        choices: allowed values; (): any.
        free: may change when a run is resumed: it affects how the run is executed, not what it
            learns.
        needs: another key and its values for which this key has an effect; no values: any but its
            default. (): always.
    """

    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    free: bool = False
    needs: tuple[str, ...] = ()

    @property
    def type(self) -> type:
        """Type of the values."""
        return type(self.default)

    def type_name(self) -> str:
        """Describe the allowed values, for error messages."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
        return names.get(self.type, "numbers separated by commas")

    def parse(self, text: str) -> Any:
        """Parse a value from text; raises ValueError or KeyError if it has another type."""
        kind = self.type
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is tuple:
            return tuple(float(part) for part in text.strip("()").split(",") if part.strip())
        return int(text.replace("_", "")) if kind is int else kind(text)

    def problem(self, value: Any) -> str:
        """Return the end of an error message if a value is invalid, else ""."""
        kind = self.type
        right_type = {
            float: isinstance(value, int | float) and not isinstance(value, bool),
            int: isinstance(value, int) and not isinstance(value, bool),
            tuple: isinstance(value, tuple | list)
            and all(isinstance(item, int | float) for item in value),
        }.get(kind, isinstance(value, kind))
        if not right_type or (self.choices and value not in self.choices):
            return f": expected {self.type_name()}{nearest(str(value), self.choices)}"
        if kind in (int, float):
            if not abs(value) < float("inf"):
                return ": expected a finite number"
            if self.low is not None and value < self.low:
                return f" is below {self.low}"
            high = LARGEST_INTEGER if self.high is None and kind is int else self.high
            if high is not None and value > high:
                return f" is above {high}"
        return ""


def option(default: Any, help: str, **limits: Any) -> Any:
    """Declare a field of an options dataclass: a configuration key.

    Args:
        default: default value; its type is the key's.
        help: one sentence for `lm config --keys`.
        **limits: further fields of `Key`: low, high, choices, free, needs.

    Returns:
        Dataclass field.
    """
    return dataclasses.field(default=default, metadata={"key": Key(default, help, **limits)})


def option_keys(options: type, section: str) -> dict[str, Key]:
    """Return the configuration keys that an options dataclass declares, by dotted path."""
    return {f"{section}.{f.name}": f.metadata["key"] for f in dataclasses.fields(options)}


@dataclass(frozen=True)
class Entry:
    """Entry of a registry.

    Attributes:
        target: class or function, or "module:attribute".
        options: dataclass of the keys that the entry adds (fields by `option`), or None.
        section: configuration section of those keys.
        shared_with: names of other entries that use the same keys.
        plugin: file that registered the entry; "" for library entries.
        module: module that registered the entry; "" for library entries.
        families: of an objective: model families that it can train.
        columns: of an objective: record columns that it needs; () if it trains on documents.
        has_prefix: of an objective: the decoder attends bidirectionally to a prefix.
        predicts_every_token: of an objective: every token is a target exactly once.
        objectives: of a model family: additional objectives that can train it.
        forms: of a data source or tokenizer: NAME or NAME:ARGUMENT; (): both are allowed.
        holds: of a data source: "documents", "records" or both.
    """

    target: Any
    options: type | None = None
    section: str = ""
    shared_with: tuple[str, ...] = ()
    plugin: str = ""
    module: str = ""
    families: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    has_prefix: bool = False
    predicts_every_token: bool = False
    objectives: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    holds: tuple[str, ...] = ("documents", "records")

    def keys_added(self) -> dict[str, Key]:
        """Return the configuration keys that the entry declares, by dotted path."""
        return option_keys(self.options, self.section) if self.options else {}


class Registry(Mapping[str, Any]):
    """Mapping from names to classes or functions, imported on first use."""

    def __init__(
        self,
        kind: str,
        keys: tuple[str, ...],
        section: str,
        entries: Mapping[str, Entry],
        is_choice: bool = True,
    ):
        """Create a registry for one kind of component.

        Args:
            kind: noun for messages, such as "objective".
            keys: configuration keys whose values are names in this registry.
            section: section of an entry's options; {name} is replaced by the entry's name.
            entries: library entries.
            is_choice: whether a key holds one name, rather than a comma-separated list of NAME or
                NAME:ARGUMENT.
        """
        self.kind, self.keys_of_names, self.section = kind, keys, section
        self.is_choice = is_choice
        self.entries = {
            name: dataclasses.replace(entry, section=section.format(name=name))
            for name, entry in entries.items()
        }
        self.version = 0  # number of registrations
        self.schema: Schema | None = None  # set by the schema that contains this registry

    def register(
        self, name: str, *, options: type | None = None, objectives: tuple[str, ...] = ()
    ) -> Callable[[T], T]:
        """Return a decorator that registers a class or function under `name`.

        Args:
            name: value of the configuration key that selects the class.
            options: dataclass of its configuration keys, with fields made by `option`.
            objectives: of a model family: library objectives that can train it.

        Raises:
            UserError: the name, or a key of the options, is taken or malformed.
        """
        from lm.config.registration import registering

        return registering(self, name, options, objectives)

    def __getitem__(self, name: str) -> Any:
        """Return the class or function; UserError for an unknown name."""
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
        """Return the error message for an unknown name, with the closest match."""
        near = difflib.get_close_matches(name, self.entries, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"unknown {self.kind} {name!r}{hint} (known: {', '.join(self.entries)})"

    def is_used(self, name: str, config: Mapping[str, Any]) -> bool:
        """Return whether a configuration uses this entry."""
        return name in self.names_in(config)

    def names_in(self, config: Mapping[str, Any]) -> list[str]:
        """Return the names that a configuration uses, without their arguments."""
        values = (config_value(config, key) for key in self.keys_of_names)
        parts = (part for value in values for part in str(value).split(","))
        return [part.partition(":")[0].strip() for part in parts]

    def keys_added(self) -> dict[str, Key]:
        """Return the configuration keys that all entries declare, by dotted path."""
        found: dict[str, Key] = {}
        for name, entry in self.entries.items():
            needs = (self.keys_of_names[0], name, *entry.shared_with)
            for path, key in entry.keys_added().items():
                found[path] = dataclasses.replace(key, needs=key.needs or needs)
        return found


def config_value(config: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path; {} if the path does not exist."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part, {})
    return value


def listed(text: str) -> list[str]:
    r"""Split a comma-separated list; "\," is a literal comma."""
    parts = (part.replace(r"\,", ",").strip() for part in re.split(r"(?<!\\),", text))
    return [part for part in parts if part]


def listing(parts: Iterable[str]) -> str:
    r"""Join parts into a comma-separated list that `listed` splits again.

    Empty parts and parts with leading or trailing white space do not survive the round trip. A part
    that ends in a backslash gets a trailing space, so that it does not escape the comma.
    """
    ends = ((part.replace(",", r"\,"), part.endswith("\\")) for part in parts)
    return ",".join(f"{part} " if is_open else part for part, is_open in ends)


class Schema(Mapping[str, Key]):
    """Configuration keys by dotted path: common keys, and the options of all registered entries."""

    def __init__(self, common: Mapping[str, Key], registries: tuple[Registry, ...]):
        """Create the schema.

        Args:
            common: keys that do not belong to a registry entry.
            registries: all registries; they validate new options against this schema.
        """
        self._common, self._registries = common, registries
        self._keys: dict[str, Key] = {}
        self._versions: tuple[int, ...] = ()
        for registry in registries:
            registry.schema = self

    def _current(self) -> dict[str, Key]:
        versions = tuple(registry.version for registry in self._registries)
        if versions != self._versions or not self._keys:
            self._keys, self._versions = self._all_keys(), versions
        return self._keys

    def __getitem__(self, path: str) -> Key:
        return self._current()[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._current())

    def __len__(self) -> int:
        return len(self._current())

    def is_section(self, path: str) -> bool:
        """Return whether any key starts with `path` and a dot."""
        return any(known.startswith(f"{path}.") for known in self)

    def plugins(self) -> list[dict[str, Any]]:
        """Return the imported plug-ins, to be recorded in run.json.

        Returns:
            One dictionary per file: "file" (absolute path), "module" (name it was imported by) and
            "registers" (names by kind).
        """
        plugins: dict[str, dict[str, Any]] = {}
        for registry in self._registries:
            for name, entry in registry.entries.items():
                if entry.plugin:
                    file = str(Path(entry.plugin).resolve())
                    new = {"file": file, "module": entry.module, "registers": {}}
                    names = plugins.setdefault(file, new)["registers"]
                    names.setdefault(registry.kind, []).append(name)
        return list(plugins.values())

    def unused_options(self, config: Mapping[str, Any]) -> dict[str, Key]:
        """Return the options of plug-ins that a configuration does not use."""
        return {
            path: key
            for registry in self._registries
            for name, entry in registry.entries.items()
            if entry.plugin and not registry.is_used(name, config)
            for path, key in entry.keys_added().items()
        }

    def _all_keys(self) -> dict[str, Key]:
        sections: dict[str, dict[str, Key]] = {}
        added = [registry.keys_added().items() for registry in self._registries]
        for path, key in itertools.chain(self._common.items(), *added):
            sections.setdefault(path.partition(".")[0], {})[path] = key
        keys = {path: key for section in sections.values() for path, key in section.items()}
        for registry in self._registries:
            if registry.is_choice:
                (path,) = registry.keys_of_names
                keys[path] = dataclasses.replace(keys[path], choices=tuple(registry))
        return keys
