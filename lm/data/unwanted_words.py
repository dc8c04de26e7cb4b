"""Lists of unwanted words: reading them, and the pattern that finds them in a text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import regex

from lm.data.files import read_lines
from lm.errors import UserError

# Scripts without spaces between words: each character counts as a word.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"


def read_words(path: Path) -> list[str]:
    """Return the words or phrases of a file, one a line, in lower case.

    Raises:
        UserError: the file is missing, or holds no word.
    """
    if not path.is_file():
        raise UserError(f"no file of words {str(path)!r}")
    found = sorted({line.strip().lower() for line in read_lines(path)} - {""})
    if not found:
        raise UserError(f"{path}: holds no word")
    return found


def words_pattern(words: Iterable[str]) -> regex.Pattern:
    """Return the pattern of whole words; those of scripts without spaces are found anywhere."""
    unspaced = regex.compile(f"[{UNSPACED}]")
    whole = [word for word in words if not unspaced.search(word)]
    anywhere = [word for word in words if unspaced.search(word)]
    return regex.compile(
        r"(?<!\w)\L<whole>(?!\w)|\L<anywhere>", whole=whole or ["\0"], anywhere=anywhere or ["\0"]
    )
