"""Scores of word vectors: word similarity and analogies.

Words are looked up as written, or else lower-cased; pairs and questions with an unknown word are
left out and counted. Shape suffixes: V words, D numbers a word, Q questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lm.data.files import read_lines
from lm.data.word_vectors import WordVectors
from lm.errors import UserError
from lm.evaluation.metrics.label_scores import spearman

Pair = tuple[str, str, float]
Question = tuple[str, str, str, str]


def read_similarities(path: str | Path) -> list[Pair]:
    """Two words and a human score a line, divided by white space (Faruqui and Dyer's files)."""
    pairs = []
    for number, line in enumerate(read_lines(Path(path)), start=1):
        try:
            first, second, score = line.split()
            pairs.append((first, second, float(score)))
        except ValueError as error:
            raise UserError(f"{path}:{number}: expected two words and a score") from error
    return pairs


def word_similarity(vectors: WordVectors, pairs: Sequence[Pair]) -> dict[str, float]:
    """Spearman's correlation of cosine and human score, over the `found` of all `pairs`.

    It is nan where fewer than two pairs are found.
    """
    unit_VD = _unit(vectors.vectors)
    rows = [(vectors.row(first), vectors.row(second), score) for first, second, score in pairs]
    found = [(a, b, score) for a, b, score in rows if a is not None and b is not None]
    cosines = [float(unit_VD[a] @ unit_VD[b]) for a, b, _ in found]
    scores = [score for *_, score in found]
    correlation = spearman(cosines, scores)["spearman"] if found else math.nan
    return {"spearman": correlation, "found": len(found), "pairs": len(pairs)}


def read_analogies(path: str | Path) -> dict[str, list[Question]]:
    """The sections of word2vec's questions-words.txt: a line ": NAME", then four words a line."""
    sections: dict[str, list[Question]] = {}
    name = None
    for number, line in enumerate(read_lines(Path(path)), start=1):
        words = line.split()
        if words[:1] == [":"] and len(words) == 2:
            name = words[1]
            sections[name] = []
        elif name is None or len(words) != 4:
            message = "expected ': NAME' of a section" + (" or four words" if name else "")
            raise UserError(f"{path}:{number}: {message}")
        else:
            a, b, c, d = words
            sections[name].append((a, b, c, d))
    return sections


def analogies(
    vectors: WordVectors, sections: Mapping[str, Sequence[Question]]
) -> dict[str, dict[str, float]]:
    """Accuracy in percent of "a is to b as c is to d" by 3CosAdd, over the questions `found`.

    The answer is the word nearest to b − a + c (unit vectors) that is none of the three; all
    words of `vectors` are candidates (word2vec's own script takes the 30,000 most frequent). By
    section, and for all "syntactic" (those named gram…), "semantic" and "total" questions.
    """
    unit_VD = _unit(vectors.vectors)
    counts: dict[str, np.ndarray] = {}  # right, found, questions
    totals = {name: np.zeros(3, int) for name in ("semantic", "syntactic", "total")}
    for name, questions in sections.items():
        rows = [[vectors.row(word) for word in question] for question in questions]
        found_Q4 = np.array([row for row in rows if None not in row], int).reshape(-1, 4)
        right = int((_answers(unit_VD, found_Q4[:, :3]) == found_Q4[:, 3]).sum())
        counts[name] = np.array([right, len(found_Q4), len(questions)])
        totals["syntactic" if name.startswith("gram") else "semantic"] += counts[name]
        totals["total"] += counts[name]
    return {
        name: {
            "accuracy": 100 * right / found if found else math.nan,
            "found": found,
            "questions": asked,
        }
        for name, (right, found, asked) in ((n, c.tolist()) for n, c in (counts | totals).items())
    }


def _answers(unit_VD: np.ndarray, abc_Q3: np.ndarray) -> np.ndarray:
    """The rows [Q] that 3CosAdd answers to questions of three rows each."""
    together = max(1, 2**24 // len(unit_VD))  # 64 MiB of scores at a time
    answers = [np.zeros(0, int)]
    for start in range(0, len(abc_Q3), together):
        a, b, c = (part := abc_Q3[start : start + together]).T
        scores_QV = (unit_VD[b] - unit_VD[a] + unit_VD[c]) @ unit_VD.T
        np.put_along_axis(scores_QV, part, -np.inf, axis=1)
        answers.append(scores_QV.argmax(1))
    return np.concatenate(answers)


def _unit(vectors_VD: np.ndarray) -> np.ndarray:
    lengths_V1 = np.linalg.norm(vectors_VD, axis=1, keepdims=True)
    return vectors_VD / np.maximum(lengths_V1, 1e-12)
