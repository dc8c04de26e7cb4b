import math

import numpy as np
import pytest

from lm.data.word_vectors import WordVectors
from lm.errors import UserError
from lm.evaluation.word_scores import analogies, read_analogies, read_similarities, word_similarity

# man : woman as king : queen, on two axes (royal, female); "throne" lies near to king
ROYAL = WordVectors(
    ("man", "woman", "king", "queen", "throne", "apple"),
    np.float32([[1, 0, 9], [1, 9, 9], [9, 0, 9], [9, 9, 9], [9, 0, 8], [-5, -5, 1]]),
)


def test_similarity_is_the_rank_correlation_of_cosines_over_the_pairs_found():
    vectors = WordVectors(("x", "y", "z", "far"), np.float32([[1, 0], [1, 1], [0, 1], [-9, 1]]))
    # cosines: x y 0.71, x z 0, x far -0.99; human ranks 3, 1, 2: Spearman 1 - 6·2 / (3·8) = 0.5
    pairs = [("x", "y", 9.0), ("X", "z", 1.0), ("x", "far", 2.0), ("x", "unknown", 5.0)]
    scores = word_similarity(vectors, pairs)
    assert scores == {"spearman": pytest.approx(0.5), "found": 3, "pairs": 4}


def test_similarity_does_not_see_lengths():
    scaled = WordVectors(ROYAL.words, ROYAL.vectors * np.float32([[1], [5], [0.1], [7], [3], [2]]))
    pairs = [("man", "woman", 3.0), ("man", "king", 2.0), ("man", "queen", 5.0)]
    assert word_similarity(scaled, pairs) == pytest.approx(word_similarity(ROYAL, pairs))


@pytest.mark.parametrize(("word", "found"), [("woman", 1), ("unheard", 0)])
def test_similarity_of_fewer_than_two_pairs_is_undefined(word, found):
    scores = word_similarity(ROYAL, [("man", word, 1.0), ("man", "unknown", 2.0)])
    assert math.isnan(scores["spearman"])
    assert scores["found"] == found


def test_similarity_files(tmp_path):
    path = tmp_path / "EN-WS-2.txt"
    path.write_text("love\tsex\t6.77\ntiger cat 7.35\n")
    assert read_similarities(path) == [("love", "sex", 6.77), ("tiger", "cat", 7.35)]
    path.write_text("love\tsex\t6.77\ntiger\tcat\n")
    with pytest.raises(UserError, match=r"EN-WS-2.txt:2: expected two words and a score"):
        read_similarities(path)


def test_analogies_by_section_kind_and_in_total():
    sections = {
        "family": [("man", "woman", "King", "queen"), ("man", "woman", "prince", "princess")],
        "capital": [("man", "king", "woman", "apple")],
        "gram1-nouns": [("woman", "man", "queen", "king"), ("king", "queen", "man", "apple")],
        "gram2-empty": [("a", "b", "c", "d")],
    }
    scores = analogies(ROYAL, sections)
    assert scores["family"] == {"accuracy": 100, "found": 1, "questions": 2}
    assert scores["capital"] == {"accuracy": 0, "found": 1, "questions": 1}
    assert scores["gram1-nouns"] == {"accuracy": 50, "found": 2, "questions": 2}
    assert math.isnan(scores["gram2-empty"]["accuracy"])
    assert scores["semantic"] == {"accuracy": 50, "found": 2, "questions": 3}
    assert scores["syntactic"] == {"accuracy": 50, "found": 2, "questions": 3}
    assert scores["total"] == {"accuracy": 50, "found": 4, "questions": 6}


def test_words_of_the_question_are_no_answer():
    # woman - man + throne is nearest to "woman" itself if that may answer
    vectors = WordVectors(
        ("a", "b", "c", "d"), np.float32([[1, 0], [0.9, 0.1], [0.9, 0.2], [0, 1]])
    )
    scores = analogies(vectors, {"s": [("a", "b", "c", "d")]})
    assert scores["total"]["accuracy"] == 100


def test_analogies_use_unit_vectors():
    scaled = WordVectors(ROYAL.words, ROYAL.vectors * np.float32([[1], [50], [1], [7], [3], [2]]))
    questions = {"s": [("man", "woman", "king", "queen"), ("queen", "woman", "king", "man")]}
    assert analogies(scaled, questions) == analogies(ROYAL, questions)


def test_many_questions_are_answered_in_parts():
    random = np.random.default_rng(0)
    vectors = WordVectors(tuple(map(str, range(30_000))), random.normal(size=(30_000, 4)))
    asked = random.integers(0, 30_000, (600, 3))  # 559 fit into a part
    unit = vectors.vectors / np.linalg.norm(vectors.vectors, axis=1, keepdims=True)
    questions = []
    for a, b, c in asked[[0, 1, 558, 559, 599]]:
        scores = unit @ (unit[b] - unit[a] + unit[c])
        best = next(i for i in np.argsort(-scores) if i not in (a, b, c))
        questions.append((str(a), str(b), str(c), str(best)))
    filler = [(str(a), str(b), str(c), str(a)) for a, b, c in asked]
    for place, question in zip([0, 1, 558, 559, 599], questions, strict=True):
        filler[place] = question
    assert analogies(vectors, {"s": filler})["total"]["accuracy"] == pytest.approx(100 * 5 / 600)


def test_analogy_files(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text(": family\nboy girl king queen\n: gram1\n: gram2\na b c d\n")
    assert read_analogies(path) == {
        "family": [("boy", "girl", "king", "queen")],
        "gram1": [],
        "gram2": [("a", "b", "c", "d")],
    }
    for text, line in [("boy girl king queen\n", 1), (": family\nboy girl king\n", 2)]:
        path.write_text(text)
        with pytest.raises(UserError, match=f"questions.txt:{line}: expected"):
            read_analogies(path)
