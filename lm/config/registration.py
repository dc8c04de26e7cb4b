"""Registration of plug-ins: validation of their names and configuration keys."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from typing import TypeVar

from lm.config.registry import Entry, Registry, Schema
from lm.errors import UserError

T = TypeVar("T")


def registering(
    registry: Registry, name: str, options: type | None, objectives: tuple[str, ...]
) -> Callable[[T], T]:
    """Return the decorator for `Registry.register`, which passes its arguments on."""
    check_name(registry, name)

    def add(target: T) -> T:
        module = target.__module__  # type: ignore[attr-defined]
        entry = Entry(
            target,
            options,
            registry.section.format(name=name),
            plugin=getattr(sys.modules.get(module), "__file__", None) or "",
            module=module,
            families=tuple(getattr(target, "families", ())),
            columns=tuple(getattr(target, "columns", ())),
            forms=tuple(getattr(target, "forms", ())),
            holds=tuple(getattr(target, "holds", ("documents", "records"))),
            has_prefix=getattr(target, "has_prefix", False),
            predicts_every_token=getattr(target, "predicts_every_token", False),
            objectives=objectives,
        )
        check_entry(registry, name, entry)
        registry.entries[name] = entry
        registry.version += 1
        return target

    return add


def check_name(registry: Registry, name: str) -> None:
    """Raise UserError if a name is malformed."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"{registry.kind} {name!r}: names consist of a-z, 0-9 and _")


def check_entry(registry: Registry, name: str, entry: Entry) -> None:
    """Raise UserError if an entry's name, or a key of its options, is taken or invalid."""
    old = registry.entries.get(name)
    if old is not None and old.plugin != entry.plugin:
        owner = f"registered by {old.plugin}" if old.plugin else "part of the library"
        raise UserError(f"{registry.kind} {name!r} already exists ({owner}); choose another name")
    if entry.options is None:
        return
    shown = f"options of the {registry.kind} {name!r}"
    if not dataclasses.is_dataclass(entry.options):
        raise UserError(f"{shown}: {entry.options!r} is not a dataclass")
    for field in dataclasses.fields(entry.options):
        key = field.metadata.get("key")
        if key is None:
            raise UserError(f"{shown}: declare {field.name} with option(DEFAULT, HELP)")
        if key.type not in (int, float, bool, str, tuple):
            raise UserError(
                f"{shown}: {field.name}={key.default!r} has a type that keys do not support"
            )
    own = old.keys_added() if old else {}
    for path in entry.keys_added():
        taken = "" if path in own or not registry.schema else _taken(registry.schema, path)
        if taken:
            raise UserError(f"{shown}: --config.{taken} already exists; choose another name")


def _taken(schema: Schema, path: str) -> str:
    """Return the existing key or section that a new key collides with, or ""."""
    parts = path.split(".")
    sections = (".".join(parts[:n]) for n in range(1, len(parts)))
    collides = path in schema or schema.is_section(path)
    return next((s for s in sections if s in schema), path if collides else "")
