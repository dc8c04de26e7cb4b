"""Word vectors of a run and their scores: word similarity and analogies (`lm vectors`).

Words are looked up as written, else in lower case; pairs and questions with an unknown word are
skipped and counted.

Shape letters: V words, D dimensions, Q questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lm.data.files import read_lines
from lm.data.tokenizer import Tokenizer
from lm.data.tokenizers.basic import WordTokenizer
from lm.data.word_vectors import WordVectors
from lm.errors import UserError
from lm.evaluation.scores import spearman
from lm.models.variables import Kind, ParamInfo, Params, flat

WordPair = tuple[str, str, float]
Analogy = tuple[str, str, str, str]


def trained_word_vectors(
    infos: Mapping[str, ParamInfo], params: Params, tokenizer: Tokenizer
) -> WordVectors:
    """Return the token embeddings of a run by word; UserError if tokens are not words."""
    if not isinstance(tokenizer, WordTokenizer):
        raise UserError(
            f"the run's tokenizer is {tokenizer.kind}: only a model of whole words "
            "(--config.data.tokenizer=words) has word vectors"
        )
    table_VD = np.asarray(flat(params)[token_table(infos)])
    return WordVectors(tokenizer.words, table_VD[: len(tokenizer.words)])


def token_table(infos: Mapping[str, ParamInfo]) -> str:
    """Return the path of the input token embedding; UserError unless there is exactly one."""
    paths = [
        path
        for path, info in infos.items()
        if info.role.kind == Kind.EMBEDDING
        and info.role.part == "input"
        and info.axes[-2:] == ("vocab", "embed")
    ]
    if len(paths) != 1:
        raise UserError(
            f"word vectors need a model with one embedding of its input tokens, not {len(paths)}"
        )
    return paths[0]


def score_word_vectors(
    vectors: WordVectors, similarities: Sequence[str], questions: str | None = None
) -> dict[str, float]:
    """Compute `word_similarity` for each file and `analogies` for each section.

    Args:
        vectors: word vectors.
        similarities: files of word pairs.
        questions: file of analogies, or None.

    Returns:
        Scores under "FILE/spearman", "analogies/SECTION/accuracy" and so on; sections without
        known questions are omitted.

    Raises:
        UserError: too few words of a file are known.
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


def read_similarities(path: str | Path) -> list[WordPair]:
    """Read two words and a human score per line, as in the files of Faruqui and Dyer (2014)."""
    pairs = []
    for number, line in enumerate(read_lines(Path(path)), start=1):
        try:
            first, second, score = line.split()
            pairs.append((first, second, float(score)))
        except ValueError as error:
            raise UserError(f"{path}:{number}: expected two words and a score") from error
    return pairs


def word_similarity(vectors: WordVectors, pairs: Sequence[WordPair]) -> dict[str, float]:
    """Return Spearman's correlation of cosine and human score, and the numbers of pairs.

    Computed over pairs whose words are known ("found"); nan for fewer than two.
    """
    unit_VD = _unit(vectors.vectors)
    rows = [(vectors.row(first), vectors.row(second), score) for first, second, score in pairs]
    found = [(a, b, score) for a, b, score in rows if a is not None and b is not None]
    cosines = [float(unit_VD[a] @ unit_VD[b]) for a, b, _ in found]
    scores = [score for *_, score in found]
    correlation = spearman(cosines, scores)["spearman"] if found else math.nan
    return {"spearman": correlation, "found": len(found), "pairs": len(pairs)}


def read_analogies(path: str | Path) -> dict[str, list[Analogy]]:
    """Read the sections of word2vec's questions-words.txt: ": NAME", then four words per line."""
    sections: dict[str, list[Analogy]] = {}
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
    vectors: WordVectors, sections: Mapping[str, Sequence[Analogy]]
) -> dict[str, dict[str, float]]:
    """Return the accuracy in percent of "a is to b as c is to d" by 3CosAdd.

    The answer is the word nearest to b − a + c (unit vectors), excluding these three; all words of
    `vectors` are candidates (word2vec's own script uses the 30,000 most frequent).

    Returns:
        Accuracy over the questions whose words are known ("found") and the numbers of questions, by
        section, and for all "syntactic" (sections named gram…), "semantic" and "total" ones.
    """
    unit_VD = _unit(vectors.vectors)
    counts: dict[str, np.ndarray] = {}  # correct, found, questions
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
    """Return the rows [Q] that 3CosAdd answers to questions of three rows each."""
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
