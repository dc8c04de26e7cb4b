"""Keys that hold lists of regular expressions, by which parameters are selected and renamed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from ml_collections import ConfigDict

from lm.config.registry import listed
from lm.errors import UserError


def pattern_problems(config: ConfigDict, keys: Iterable[str]) -> Iterator[str]:
    """Yield what is wrong with the patterns in some keys, and with `--config.init.rename`."""
    for key in keys:
        section, _, name = key.partition(".")
        try:
            compile_patterns(key, config[section][name])
        except UserError as error:
            yield str(error)
    try:
        rename_rules(config.init.rename)
    except UserError as error:
        yield str(error)


def compile_patterns(key: str, text: str) -> list[re.Pattern]:
    """Return the regular expressions in a list separated by commas.

    Raises:
        UserError: one is not a regular expression; the message names `key`.
    """
    found = []
    for part in listed(text):
        try:
            found.append(re.compile(part))
        except re.error as error:
            raise UserError(f"--config.{key}: {part!r} is no regular expression: {error}") from None
    return found


def rename_rules(text: str) -> list[tuple[re.Pattern, str]]:
    """Return patterns and replacements of `--config.init.rename`.

    Raises:
        UserError: a rule is not PATTERN=>NAME.
    """
    found = []
    for rule in listed(text):
        pattern, arrow, replacement = rule.partition("=>")
        if not arrow:
            raise UserError(f"--config.init.rename: {rule!r} is not PATTERN=>NAME")
        try:
            found.append((re.compile(pattern), replacement))
            found[-1][0].sub(replacement, "")
        except re.error as error:
            raise UserError(f"--config.init.rename: {rule!r}: {error}") from None
    return found
