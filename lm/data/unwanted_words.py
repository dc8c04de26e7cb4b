"""Word lists of unwanted terms: reading them, and matching them in text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import regex

from lm.data.files import read_lines
from lm.errors import UserError

# Scripts without spaces between words: each character counts as a word.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"


def read_words(path: Path) -> list[str]:
    """Read a file of words or phrases, one per line, in lower case.

    Raises:
        UserError: the file is missing or empty.
    """
    if not path.is_file():
        raise UserError(f"no word list {str(path)!r}")
    found = sorted({line.strip().lower() for line in read_lines(path)} - {""})
    if not found:
        raise UserError(f"{path}: the word list is empty")
    return found


def words_pattern(words: Iterable[str]) -> regex.Pattern:
    """Return a pattern of whole words; in scripts without spaces, of any occurrence."""
    unspaced = regex.compile(f"[{UNSPACED}]")
    whole = [word for word in words if not unspaced.search(word)]
    anywhere = [word for word in words if unspaced.search(word)]
    return regex.compile(
        r"(?<!\w)\L<whole>(?!\w)|\L<anywhere>", whole=whole or ["\0"], anywhere=anywhere or ["\0"]
    )
