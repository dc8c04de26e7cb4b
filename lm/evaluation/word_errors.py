"""Word and character error rates of transcripts (jiwer): edits / total length of the references.

Both sides are normalized first: NFKC, lower case, and a space for every character that is not a
letter, mark, number or apostrophe. Apostrophes stay ("don't" is one word), in their plain form.
Numbers are not spelled out, unlike in Whisper's English normalizer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from lm.errors import UserError, missing_package
from lm.evaluation.scores import single


def wer(
    predictions: Sequence[str], references: Sequence, normalize_words: bool = True
) -> dict[str, float]:
    """Return the word error rate in percent; many insertions can exceed 100."""
    found = _measure("process_words", predictions, references, normalize_words)
    return {"wer": 100 * found.wer}


def cer(
    predictions: Sequence[str], references: Sequence, normalize_words: bool = True
) -> dict[str, float]:
    """Return the character error rate in percent, spaces between words included."""
    found = _measure("process_characters", predictions, references, normalize_words)
    return {"cer": 100 * found.cer}


def normalize_transcript(text: str) -> str:
    """Normalize to lower case without punctuation or symbols, with single spaces."""
    text = re.sub("[\u2018\u2019\u02bc]", "'", unicodedata.normalize("NFKC", text)).lower()
    kept = (c if unicodedata.category(c)[0] in "LMN" or c == "'" else " " for c in text)
    return " ".join("".join(kept).split())


def _measure(
    function: str, predictions: Sequence[str], references: Sequence, normalize_words: bool
) -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise missing_package("this metric", "jiwer", "audio") from error
    tidy = normalize_transcript if normalize_words else lambda text: " ".join(text.split())
    gold = [tidy(text) for text in single(references)]
    if not any(gold):
        raise UserError("a word error rate needs references with words")
    return getattr(jiwer, function)(gold, [tidy(text) for text in predictions])
