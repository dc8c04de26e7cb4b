"""What `lm vectors` does: take the word vectors out of a run, and score word vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm.data.tokenizers.tokenizer import Tokenizer
from lm.data.tokenizers.words import WordTokenizer
from lm.data.word_vectors import WordVectors
from lm.errors import UserError
from lm.evaluation.word_scores import analogies, read_analogies, read_similarities, word_similarity


def run_vectors(params: Any, tokenizer: Tokenizer) -> WordVectors:
    """The rows of a run's token table, by word; UserError if its tokens are no words."""
    if not isinstance(tokenizer, WordTokenizer):
        raise UserError(
            f"the run's tokenizer is {tokenizer.kind}: only a model of whole words "
            "(--config.data.tokenizer=words) has word vectors"
        )
    table_VD = np.asarray(params["tokens"]["embedding"])
    return WordVectors(tokenizer.words, table_VD[: len(tokenizer.words)])


def scores(
    vectors: WordVectors, similarities: Sequence[str], questions: str | None = None
) -> dict[str, float]:
    """What `word_similarity` says of each file, and `analogies` of each section that has words.

    Keys are "FILE/spearman", "analogies/SECTION/accuracy" and so on. UserError for a file of which
    too few words are known for a score.
    """
    n_words, d = vectors.vectors.shape
    report: dict[str, float] = {"words": n_words, "dimensions": d}
    for path in similarities:
        result = word_similarity(vectors, read_similarities(path))
        if math.isnan(result["spearman"]):
            raise UserError(
                f"{path}: {result['found']} of {result['pairs']} pairs have vectors, "
                "too few for a correlation"
            )
        report |= {f"{Path(path).stem}/{name}": value for name, value in result.items()}
    if questions is not None:
        sections = analogies(vectors, read_analogies(questions))
        if not sections["total"]["found"]:
            raise UserError(f"{questions}: no question has vectors for all its words")
        report |= {
            f"analogies/{section}/{name}": value
            for section, result in sections.items()
            if result["found"]
            for name, value in result.items()
        }
    return report
