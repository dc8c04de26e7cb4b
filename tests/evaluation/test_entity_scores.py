"""F1 of entities, against figures worked out by hand by conlleval's rules."""

import pytest

from lm.evaluation.scores import score_predictions


def test_entity_counts_when_its_words_and_its_type_are_right():
    gold = ["B-PER I-PER O B-LOC", "O B-ORG O", "O"]
    found = ["B-PER I-PER O B-PER", "O B-ORG I-ORG", "O"]
    # Of three entities found and three there are one is right; of eight tags six.
    scores = score_predictions(["seqeval"], found, gold)
    assert scores["precision"] == pytest.approx(100 / 3)
    assert scores["recall"] == pytest.approx(100 / 3)
    assert scores["f1"] == pytest.approx(100 / 3)
    assert scores["accuracy"] == pytest.approx(75)


def test_nothing_found_is_zero_and_all_right_is_a_hundred():
    assert score_predictions(["seqeval"], ["O O"], ["B-PER O"])["f1"] == 0
    assert score_predictions(["seqeval"], ["B-PER O"], ["B-PER O"])["f1"] == 100
