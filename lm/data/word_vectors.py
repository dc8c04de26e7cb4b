"""Word vectors in GloVe's text format: "word number number …" per line, plain or .gz.

Shape suffixes: N words of the file, V rows of an embedding table, D dimensions.
"""

from __future__ import annotations

import gzip
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from lm.data.files import read_lines
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError


@dataclass(frozen=True, eq=False)
class WordVectors:
    """Words of a file in order, usually by descending frequency, with their vectors.

    Attributes:
        words: N words.
        vectors: float32 [N, D].
    """

    words: tuple[str, ...]
    vectors: np.ndarray

    @cached_property
    def _rows(self) -> dict[str, int]:
        # reversed, so that the first vector of a repeated word counts
        return {self.words[i]: i for i in reversed(range(len(self.words)))}

    def row(self, word: str) -> int | None:
        """Return the row of a word or of its lowercase form; None if there is neither."""
        row = self._rows.get(word)
        return self._rows.get(word.lower()) if row is None else row


def load_vectors(path: str | Path) -> WordVectors:
    """Read GloVe's text format, or word2vec's, whose first line is "N D".

    Raises:
        UserError: a line is not a word and D finite numbers.
    """
    path = Path(path)
    lines = read_lines(path)
    first = next(lines, "")
    fields = first.split()
    header = len(fields) == 2 and all(field.isdecimal() for field in fields)
    d = int(fields[1]) if header else len(fields) - 1
    if d < 1:
        raise UserError(f"{path}:1: expected a word and its vector, in GloVe's text format")
    words: list[str] = []
    numbers = array("f")
    start = 2 if header else 1
    for number, line in enumerate(lines if header else chain([first], lines), start):
        try:
            word, *values = line.rstrip(" ").rsplit(" ", d)  # a few words contain spaces
            numbers.extend(map(float, values))
        except ValueError:
            values = []
        if len(values) != d:
            raise UserError(f"{path}:{number}: expected a word and {d} numbers")
        words.append(word)
    vectors = np.asarray(numbers).reshape(-1, d)
    if not np.isfinite(vectors).all():
        bad = int(np.argmin(np.isfinite(vectors).all(1)))
        raise UserError(f"{path}:{start + bad}: the vector contains a non-finite number")
    if header and len(words) != int(fields[0]):
        raise UserError(f"{path}:1: announces {fields[0]} words, but the file has {len(words)}")
    return WordVectors(tuple(words), vectors)


def save_vectors(vectors: WordVectors, path: str | Path) -> None:
    """Write GloVe's text format, with all digits of the float32 values."""
    for number, word in enumerate(vectors.words, start=1):
        if not word or " " in word or "\n" in word:
            raise UserError(
                f"word {number}, {word!r}, cannot be written: it must not contain spaces"
            )
    path = Path(path)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="\n") as file:
        for word, vector in zip(vectors.words, vectors.vectors.astype(np.float32), strict=True):
            file.write(f"{word} {' '.join(vector.astype(str))}\n")


def vocabulary_words(tokenizer: Tokenizer) -> list[str]:
    """Return the text of each id without white space, as words for `pretrained_embeddings`."""
    return [tokenizer.decode([i]).strip() for i in range(tokenizer.vocab_size)]


def pretrained_embeddings(
    vectors: WordVectors, words: Sequence[str], rows: int, std: float, seed: int
) -> tuple[np.ndarray, int]:
    """Return an initial embedding table from word vectors.

    Args:
        vectors: word vectors.
        words: word of each row.
        rows: number of rows V of the table.
        std: standard deviation of the normal initialization of rows without a vector.
        seed: random seed of these rows.

    Returns:
        Table, float32 [V, D], and the number of words that have a vector.
    """
    shape = rows, vectors.vectors.shape[1]
    table_VD = np.random.default_rng(seed).normal(0.0, std, shape).astype(np.float32)
    found = [(i, row) for i, word in enumerate(words) if (row := vectors.row(word)) is not None]
    for i, row in found:
        table_VD[i] = vectors.vectors[row]
    return table_VD, len(found)
