"""Reading of run.json, and import of the plug-ins that the run uses.

A plug-in is a Python file, imported by an experiment file, that registers classes
(`lm/config/registry.py`). run.json records the imported ones (`Schema.plugins`); reading it
imports them again.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm.config.experiment_file import error_in, execute, importable
from lm.config.registries import REGISTRIES
from lm.config.registry import Registry
from lm.errors import UserError
from lm.storage import AnyPath, read_json


def read_run_json(file: AnyPath) -> dict[str, Any]:
    """Read a run.json and import its plug-ins; the result has at least "config"."""
    try:
        run = read_json(file)
    except FileNotFoundError:
        raise UserError(f"no file {file}") from None
    values = run.get("config")
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: it contains no configuration")
    if plugins := run.get("plugins"):
        try:
            import_plugins(plugins, values)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file} is damaged: invalid plug-in list ({type(error).__name__})"
            ) from None
    return run


def import_plugins(plugins: Iterable[Mapping[str, Any]], config: Mapping[str, Any]) -> None:
    """Import the plug-ins of a run unless they are already imported.

    Args:
        plugins: as returned by `Schema.plugins`.
        config: configuration of the run. Plug-ins that it does not use may be missing.

    Raises:
        UserError: a file does not exist or fails, or no longer registers a name.
    """
    for plugin in plugins:
        file = Path(plugin["file"])
        names = [
            (registry, name)
            for registry in REGISTRIES
            for name in plugin["registers"].get(registry.kind, ())
        ]
        if all(_is_from(file, registry, name) for registry, name in names):
            continue
        used = [(registry, name) for registry, name in names if registry.is_used(name, config)]
        if not file.is_file():
            if not used:
                continue
            registry, name = used[0]
            raise UserError(
                f"the run uses the {registry.kind} {name!r} of {file}, which does not exist: "
                "restore the file"
            )
        try:
            _import(file, plugin["module"])
        except BaseException as error:
            raise error_in(file, error) from error
        for registry, name in used:
            if name not in registry:
                raise UserError(f"{file} no longer registers the {registry.kind} {name!r}")


def _is_from(file: Path, registry: Registry, name: str) -> bool:
    entry = registry.entries.get(name)
    return entry is not None and entry.plugin != "" and Path(entry.plugin).resolve() == file


def _import(file: Path, module: str) -> None:
    """Import a file under its original module name, or execute it if that name fails."""
    path = file.parent if file.name == "__init__.py" else file.with_suffix("")
    parts = module.split(".")
    if list(path.parts[-len(parts) :]) != parts:
        execute(file)
        return
    importable(path.parents[len(parts) - 1])
    found = importlib.import_module(module)
    if Path(found.__file__ or "").resolve() != file:
        execute(file)
