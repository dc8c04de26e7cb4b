"""Canaries: random lines inserted into training text, to measure memorization.

After Carlini et al. 2019, "The Secret Sharer". Canary i is `data.canary_format` with a random digit
for each #. The numbers depend on the format alone, so an evaluation can reproduce both the inserted
canaries and as many that were not inserted.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lm.data.sources import Chunk, Corpus, Part
from lm.errors import UserError

DIGIT = "#"


def canary_lines(data: Any) -> tuple[list[str], list[str]]:
    """Return the inserted canaries of a configuration, and as many that are not inserted.

    Args:
        data: section `data` of the configuration.
    """
    n, digits = data.canaries, data.canary_format.count(DIGIT)
    draw = random.Random(data.canary_format)
    numbers = draw.sample(range(10**digits), 2 * n)
    lines = [fill_digits(data.canary_format, number) for number in numbers]
    return lines[:n], lines[n:]


def fill_digits(form: str, number: int) -> str:
    """Replace the # characters of a format by the digits of a number, zero-padded."""
    digits = iter(f"{number:0{form.count(DIGIT)}}")
    return "".join(next(digits) if letter == DIGIT else letter for letter in form)


def repeats_of(data: Any) -> list[int]:
    """Return how often each canary is inserted, by cycling through `data.canary_repeats`."""
    repeats = [int(n) for n in data.canary_repeats]
    return [repeats[i % len(repeats)] for i in range(data.canaries)]


def plant(sources: Sequence[Corpus], data: Any) -> tuple[Corpus, ...]:
    """Return the training corpora, with canaries inserted into the first one.

    Raises:
        UserError: the first corpus is pretokenized.
    """
    if not sources:
        return ()
    first, *others = sources
    if hasattr(getattr(first, "corpus", first), "build_store"):
        raise UserError(f"--config.data.canaries: {first.name} is pretokenized; put text first")
    lines = canary_lines(data)[0]
    copies = [x for x, n in zip(lines, repeats_of(data), strict=True) for _ in range(n)]
    return (Planted(first, tuple(copies)), *others)


@dataclass(frozen=True)
class Planted:
    """Corpus with additional lines inserted at random places.

    The places depend only on the length of the text and on the lines. Finding them takes a pass
    over the text, and the corpus is read by a single process.

    Attributes:
        whole: original corpus.
        lines: lines to insert; a line listed several times is inserted as often.
    """

    whole: Corpus
    lines: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def size(self) -> int | None:
        return self.whole.size

    @property
    def card(self) -> str:
        """Digest of the data card of the corpus; "" without one."""
        return getattr(self.whole, "card", "")

    @property
    def digest(self) -> str:
        return hashlib.sha256(
            repr((self.whole.digest, "canaries", self.lines)).encode()
        ).hexdigest()

    def parts(self) -> tuple[Part, ...]:
        return (self,)

    @cached_property
    def _places(self) -> list[tuple[int, str]]:
        """Character offsets after which lines are inserted, in order, with the lines."""
        size = sum(len(chunk.text) for chunk in self.whole.chunks())
        draw = random.Random(size)
        lines = draw.sample(self.lines, len(self.lines))
        return list(zip(sorted(draw.randrange(size) for _ in lines), lines, strict=True))

    def chunks(self) -> Iterator[Chunk]:
        start, places = 0, self._places[::-1]
        for chunk in self.whole.chunks():
            rows, end = chunk.text.split("\n"), start + len(chunk.text)
            while places and places[-1][0] < end:
                place, line = places.pop()
                row = chunk.text.count("\n", 0, place - start)
                is_end = row == len(rows) - 1 and not chunk.last
                rows[row] += f"\n{line}\n" if is_end else f"\n{line}"
            yield chunk._replace(text="\n".join(rows))
            start = end
