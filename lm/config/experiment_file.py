"""Experiment files: Python files with `get_config(variant)` and the names of their VARIANTS."""

from __future__ import annotations

import importlib.util
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from lm.errors import UserError

T = TypeVar("T")


def call_file(file: Path, function: str, variant: str) -> Any:
    """What a function of a Python file returns, called with the variant if there is one."""

    def call(module: ModuleType) -> Any:
        if not hasattr(module, function):
            raise UserError(f"{file} has no {function}(variant)")
        called = getattr(module, function)
        return called(variant) if variant else called()

    return _with_module(file, call)


def variants_in(folder: Path) -> list[str]:
    """`FILE.py:VARIANT` of every variant of every experiment file in a folder, in order.

    A file without VARIANTS is one experiment, `FILE.py`. UserError if there is no such file.
    """
    files = sorted(folder.glob("*.py"))
    if not files:
        raise UserError(f"no experiment files (*.py) in {folder}")
    return [
        f"{file}:{variant}" if variant else str(file)
        for file in files
        for variant in _with_module(file, lambda module: getattr(module, "VARIANTS", ("",)))
    ]


def _with_module(file: Path, use: Callable[[ModuleType], T]) -> T:
    """`use` of the executed file; what fails in it is an error that says where."""
    if not file.is_file():
        raise UserError(f"no experiment file {file}")
    spec = importlib.util.spec_from_file_location(
        f"experiment_{re.sub(r'[^0-9a-zA-Z]', '_', file.stem)}", file
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return use(module)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except Exception as error:  # the experiment file is the user's code: say where it failed
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)
        ]
        where = f"{file}:{lines[-1]}" if lines else str(file)
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
