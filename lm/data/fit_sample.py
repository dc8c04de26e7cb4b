"""Bounded sample of a large corpus, for fitting a tokenizer."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lm.data.sources import Corpus, Part

_LEAST = 2**24  # minimum characters read per part


def read_sample(corpora: Sequence[Corpus], most: int, folder: Path) -> Iterator[str]:
    """Yield texts from the starts of randomly chosen parts of the corpora.

    Parts are files, or ranges of large files; the sample is deterministic. Held-out validation
    documents are not known before the corpus is read, and may be included.

    Args:
        corpora: corpora to sample.
        most: number of characters of the sample, if there are as many.
        folder: folder of the tokenizer; its sample.txt, and a line on stderr, describe the sample.
    """
    parts = [part for corpus in corpora for part in _parts(corpus)]
    random.Random(0).shuffle(parts)
    of_each = max(-(-most // len(parts)), _LEAST)
    size, n_parts = 0, 0
    for part in parts:
        if size >= most:
            break
        n_parts, stop = n_parts + 1, min(size + of_each, most)
        for chunk in part.chunks():
            yield chunk.text
            size += len(chunk.text)
            if size >= stop:
                break
    names = ", ".join(corpus.name for corpus in corpora)
    said = f"fitted to {size:,} characters from the starts of {n_parts:,} of {len(parts):,} parts"
    print(f"tokenizer: {said} of {names}, drawn at random", file=sys.stderr)
    (folder / "sample.txt").write_text(f"{said} of {names}, drawn at random\n")


def _parts(corpus: Corpus) -> Sequence[Part]:
    """Return the parts of a corpus, ignoring held-out documents."""
    whole = getattr(corpus, "corpus", corpus)
    return whole.parts() if hasattr(whole, "parts") else (corpus,)
