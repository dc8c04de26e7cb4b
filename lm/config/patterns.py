"""Keys whose values are lists of regular expressions that select or rename parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from ml_collections import ConfigDict

from lm.config.registry import listed
from lm.errors import UserError


def pattern_problems(config: ConfigDict, keys: Iterable[str]) -> Iterator[str]:
    """Yield an error message for each invalid pattern or PATTERN=>… rule in these keys."""
    for key in keys:
        section, _, name = key.partition(".")
        try:
            compile_patterns(key, config[section][name])
        except UserError as error:
            yield str(error)
    for rules, text in ((rename_rules, config.init.rename), (rate_rules, config.optimizer.rates)):
        try:
            rules(text)
        except UserError as error:
            yield str(error)


def compile_patterns(key: str, text: str) -> list[re.Pattern]:
    """Compile a comma-separated list of regular expressions.

    Raises:
        UserError: an expression is invalid; the message names `key`.
    """
    found = []
    for part in listed(text):
        try:
            found.append(re.compile(part))
        except re.error as error:
            raise UserError(
                f"--config.{key}: {part!r} is not a valid regular expression: {error}"
            ) from None
    return found


def rename_rules(text: str) -> list[tuple[re.Pattern, str]]:
    """Parse `--config.init.rename` into (pattern, replacement) pairs.

    Raises:
        UserError: a rule is not PATTERN=>NAME.
    """
    found = []
    for rule, pattern, replacement in _arrows("init.rename", text, "NAME"):
        try:
            found.append((re.compile(pattern), replacement))
            found[-1][0].sub(replacement, "")
        except re.error as error:
            raise UserError(f"--config.init.rename: {rule!r}: {error}") from None
    return found


def rate_rules(text: str) -> list[tuple[str, float]]:
    """Parse `--config.optimizer.rates` into (pattern, factor) pairs.

    Raises:
        UserError: a rule is not PATTERN=>FACTOR.
    """
    found = []
    for rule, pattern, factor in _arrows("optimizer.rates", text, "FACTOR"):
        try:
            found.append((re.compile(pattern).pattern, float(factor)))
        except (re.error, ValueError) as error:
            raise UserError(f"--config.optimizer.rates: {rule!r}: {error}") from None
        if not 0 <= found[-1][1] < float("inf"):
            raise UserError(f"--config.optimizer.rates: {rule!r}: expected a factor of at least 0")
    return found


def _arrows(key: str, text: str, right: str) -> Iterator[tuple[str, str, str]]:
    """Yield each rule PATTERN=>`right` of a key with its two sides."""
    for rule in listed(text):
        pattern, arrow, value = rule.partition("=>")
        if not arrow:
            raise UserError(f"--config.{key}: {rule!r} is not PATTERN=>{right}")
        yield rule, pattern, value
