"""Attribution of the characters of a rendered conversation to messages or the template.

A template is rendered twice: with the actual values, and with each character of a message's texts
replaced by one that stands for the message. Both results have the same length, so the second gives
the owner of each character in the first, even if the template trims, splits, joins, repeats or
drops text. White space and characters that JSON escapes stay, as do words such as "</think>" that
the template looks for in text. A third rendering, in which white space at the edges of texts is
replaced too, determines the owner of that white space if it corresponds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

_FIRST = 0xF0000  # first of the private characters that stand for owners
MARKS = ("\U0010fffc", "\U0010fffd")  # around what an assistant says; in the second text only
_REPLACED = re.compile(r'[^\s"\\\x00-\x1f\x7f]+')
_STAYS = r'[\s"\\\x00-\x1f\x7f]'
_EDGES = re.compile(rf"\A{_STAYS}+|(?<!{_STAYS}){_STAYS}+\Z")
_SPACES = ("\u2003", "\u2002")  # templates trim them like all white space
_AS_THEY_ARE = ("role", "type")  # keys whose values give the kind of an object


@dataclass(frozen=True)
class Traced:
    """Rendered text of a conversation, with owners.

    Attributes:
        text: the text, L characters.
        owner: int32 [L]: index of the message that a character comes from; -1 for the template's
            characters, and for those that were not replaced.
        whole: int32 [L]: same, but including unreplaced characters at the edges of messages.
        said: bool [L]: within `{% generation %}`.
        outline: text with the characters of messages replaced.
    """

    text: str
    owner: np.ndarray
    whole: np.ndarray
    said: np.ndarray
    outline: str


def replaced(
    value: Any,
    owner: int,
    guarded: re.Pattern[str] | None,
    kept: re.Pattern[str] | None = None,
    keys: Collection[str] = (),
) -> Any:
    """Replace the characters of texts in a JSON value by an owner's marker.

    Args:
        value: the value.
        owner: number of the owner.
        guarded: pattern of token names, of which no character stays; in object keys, by which
            objects may be sorted, only the first character is replaced.
        kept: pattern of other text that stays.
        keys: texts that stay if they match completely.
    """
    sign = chr(_FIRST + owner)

    def plain(text: str) -> str:
        return _REPLACED.sub(lambda found: sign * len(found[0]), text)

    def outside(text: str) -> str:
        return text if text in keys else _parts(kept, text, plain, str)

    def of_text(text: str) -> str:
        return _parts(guarded, text, outside, lambda name: sign * len(name))

    def of_key(text: str) -> str:
        return _parts(guarded, text, str, lambda name: name[0] + sign * (len(name) - 1))

    def of_value(value: Any, key: Any = None) -> Any:
        if isinstance(value, str):
            return of_key(value) if key in _AS_THEY_ARE else of_text(value)
        if isinstance(value, list):
            return [of_value(item) for item in value]
        if isinstance(value, Mapping):
            return {
                of_key(name) if isinstance(name, str) else name: of_value(item, name)
                for name, item in value.items()
            }
        return value

    return of_value(value)


def _parts(
    pattern: re.Pattern[str] | None,
    text: str,
    between: Callable[[str], str],
    found: Callable[[str], str],
) -> str:
    """Apply functions to the matches of a pattern with one group, and to the text between them."""
    if pattern is None:
        return between(text)
    parts = enumerate(pattern.split(text))
    return "".join(found(part) if number % 2 else between(part) for number, part in parts)


def keys_of(value: Any) -> set[str]:
    """Return the keys of all objects in a JSON value."""
    if isinstance(value, Mapping):
        return {str(key) for key in value}.union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


def longest_of(texts: Collection[str]) -> re.Pattern[str] | None:
    """Return a pattern with one group that matches the longest of some texts."""
    longest_first = sorted(filter(None, texts), key=lambda text: (-len(text), text))
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def compare(text: str, traced: str, n_owners: int) -> Traced | None:
    """Return the owners of a text's characters; None if the texts do not correspond.

    Args:
        text: template output for the actual values.
        traced: template output for the replaced values.
        n_owners: number of owners.
    """
    found, (plain, said) = codes(text), _without_marks(traced)
    if len(plain) != len(found):
        return None
    owner = plain.astype(np.int64) - _FIRST
    is_owned = (owner >= 0) & (owner < n_owners)
    if not np.array_equal(found[~is_owned], plain[~is_owned]):
        return None
    owner = np.where(is_owned, owner, -1).astype(np.int32)
    return Traced(text, owner, owner, said, plain.tobytes().decode("utf-32-le"))


def with_other_edges(text: str, sign: str) -> str:
    """Replace characters at a text's edges that `replaced` leaves unchanged.

    Args:
        text: the text.
        sign: replacement for characters other than white space.
    """

    def other(character: str) -> str:
        if not character.isspace():
            return sign
        return _SPACES[character == _SPACES[0]]

    return _EDGES.sub(lambda found: "".join(map(other, found[0])), text)


def with_edges(traced: Traced, other: str) -> Traced:
    """Extend ownership to edge characters, which differ in another rendering.

    They belong to the adjacent message. A rendering that does not correspond is ignored.
    """
    found, plain = codes(traced.outline), _without_marks(other)[0]
    if len(plain) != len(found):
        return traced
    whole, changed = traced.whole.copy(), np.flatnonzero(plain != found)
    for at, beside in [(i, i - 1) for i in changed] + [(i, i + 1) for i in changed[::-1]]:
        if whole[at] < 0 and 0 <= beside < len(whole):
            whole[at] = whole[beside]
    return replace(traced, whole=whole)


def first_difference(traced: Traced, other: str) -> int | None:
    """Return where another text first differs from the outline; None if it does not."""
    one, two = codes(traced.outline), _without_marks(other)[0]
    n = min(len(one), len(two))
    unlike = np.flatnonzero(one[:n] != two[:n])
    return int(unlike[0]) if len(unlike) else None if len(one) == len(two) else n


def _without_marks(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the code points of a text without marks, and which were between marks, [L] each."""
    found = codes(text)
    start, end = (found == ord(mark) for mark in MARKS)
    between = np.cumsum(start.astype(np.int32) - end) > 0
    return found[~(start | end)], between[~(start | end)]


def codes(text: str) -> np.ndarray:
    """Return the code points of a text, uint32 [L]."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)
