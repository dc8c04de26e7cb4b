"""What the metrics share: examples of several references, and libraries that may be missing."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from lm.errors import UserError


def alternatives(reference: Any) -> Sequence[Any]:
    """The right answers of one example: a list or tuple names several, anything else is the one."""
    return reference if isinstance(reference, list | tuple) else (reference,)


def single(references: Sequence) -> Sequence:
    """The references of a metric that knows one right answer only; UserError if one is a list."""
    for number, reference in enumerate(references, start=1):
        if isinstance(reference, list | tuple):
            raise UserError(f"example {number} has several references, this metric takes one")
    return references


def library(module: str) -> Any:
    """A module of the optional libraries; UserError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-").replace("sklearn", "scikit-learn")
        message = f"this metric needs the package `{package}`: pip install 'lm[eval]'"
        raise UserError(message) from error
