"""Exceptions for user errors and lost peers, and parts of their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

_DISTRIBUTION = "lm-jax"  # "lm" on PyPI is a different project


class UserError(Exception):
    """Mistake that the user can correct; the message says what, where and what to do.

    The command line prints it and exits with code 2. It is always one line: line ends in quoted
    text become spaces, and other control characters are shown as Python writes them.
    """

    def __str__(self) -> str:
        return "".join(
            c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1]
            for c in super().__str__()
        )


class LostPeerError(Exception):
    """Another process of the run does not answer; the message is one line.

    The command line prints it and exits with code 1: the same command may succeed later.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the known name closest to an unknown one, as the end of a message, or return ""."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def missing_package(purpose: str, package: str, extra: str) -> UserError:
    """Return the error of an optional package that is not installed.

    Args:
        purpose: what needs it, the start of the message.
        package: name of the package.
        extra: extra of this project that installs it.
    """
    checkout = Path(__file__).parents[1]
    is_checkout = (checkout / "pyproject.toml").is_file()
    project = f"-e '{checkout}" if is_checkout else f"'{_DISTRIBUTION}"
    return UserError(f"{purpose} needs the package `{package}`: pip install {project}[{extra}]'")
