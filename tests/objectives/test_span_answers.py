import json

import numpy as np
import pytest

from lm.config import default
from lm.data.record_store import build_record_store
from lm.data.records import open_records
from lm.data.special_tokens import SpecialTokens
from lm.data.tokenizers.basic import WordTokenizer
from lm.objectives.span_qa import SpanQa, best_span

SPECIAL = SpecialTokens(0, 0, 0, 0, 0, 0, vocab_size=1)


def exhaustive(scores_L2):
    """The best (score, start, end) of all that are allowed."""
    n = len(scores_L2)
    return max(
        (scores_L2[start, 0] + scores_L2[end, 1], start, end)
        for start in range(1, n)
        for end in range(start, min(start + 30, n))
    )


@pytest.mark.parametrize("n_open", [1, 2, 7, 80])
def test_best_span_matches_an_exhaustive_search(n_open):
    rng = np.random.default_rng(n_open)
    for _ in range(50):
        scores_L2 = np.full((90, 2), -np.inf)
        first = rng.integers(1, 90 - n_open)
        scores_L2[first : first + n_open] = rng.normal(size=(n_open, 2))
        scores_L2[0] = 9
        found = best_span(scores_L2)
        assert found == pytest.approx(exhaustive(scores_L2))


def test_answer_has_at_most_thirty_tokens():
    scores_L2 = np.zeros((50, 2))
    scores_L2[5, 0] = scores_L2[35, 1] = 1  # 31 tokens
    scores_L2[34, 1] = 0.5
    assert best_span(scores_L2) == (1.5, 5, 34)


def test_answer_does_not_end_before_it_starts():
    scores_L2 = np.array([[0, 0], [0, 5], [3, 0], [0, 1.0]])
    assert best_span(scores_L2) == (5, 1, 1)


@pytest.fixture
def answer(tmp_path):
    """Answers to two records by scores: contexts of seven words in three windows, and of two."""
    contexts = ["Zero, one  two-three (four)", "five  six."]

    def answers(outputs, may_lack):
        paragraphs = []
        for context in contexts:
            given = [] if may_lack else [{"text": context[:1], "answer_start": 0}]
            question = {"question": "?", "answers": given, "is_impossible": may_lack}
            paragraphs.append({"context": context, "qas": [{"id": context, **question}]})
        (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
        records = open_records(f"squad:{tmp_path}/squad.json", default().data)
        store = build_record_store(records, WordTokenizer.fit(contexts), tmp_path)
        objective = SpanQa(9, 3, SPECIAL)
        assert store.lengths("context").tolist() == [9, 3]
        assert len(objective.examples(store, training=False)) == 4
        return objective.answers([store], outputs)

    return answers


def scores(*windows):
    """Scores [N, 9, 2]: -inf but for [cls], the context's columns 3 …, and what is given."""
    found = np.full((4, 9, 2), -np.inf)
    for window_L2, n_context in zip(found, (5, 5, 3, 3), strict=True):
        window_L2[[0, *range(3, 3 + n_context)]] = 0
    for window, column, side, value in windows:
        found[window, column, side] = value
    return found


def test_best_window_answers_in_the_words_of_the_context(answer):
    # Tokens: Zero , one two - three ( four ) / five six . — windows start at 0, 3 and 6.
    found = scores((0, 3, 0, 4), (1, 3, 0, 3), (1, 5, 1, 2), (3, 4, 0, 1), (3, 4, 1, 1))
    assert answer(found, may_lack=False) == ["two-three", "six"]
    found = scores((0, 3, 0, 4), (0, 5, 1, 2), (1, 3, 0, 3), (1, 5, 1, 2), (3, 3, 0, 1))
    assert answer(found, may_lack=False) == ["Zero, one", "five"]
    found = scores((2, 3, 0, 1), (2, 5, 1, 1), (3, 3, 0, 1), (3, 5, 1, 1))
    assert answer(found, may_lack=False) == ["(four)", "five  six."]


def test_no_answer_wins_where_cls_has_more_in_every_window(answer):
    cls = [(window, 0, side, 2) for window in range(4) for side in (0, 1)]
    found = scores(*cls, (1, 3, 0, 3), (3, 3, 0, 5))
    assert answer(found, may_lack=True) == ["", "five"]
    assert answer(found, may_lack=False) == ["two", "five"]
    # One window of the three in which [cls] has less than the best answer.
    found = scores(*cls, (1, 3, 0, 3), (2, 0, 0, 0.5))
    assert answer(found, may_lack=True) == ["two", ""]


def test_context_without_tokens_has_no_answer(answer):
    found = scores()
    found[3, 1:] = -np.inf
    assert answer(found, may_lack=False)[1] == ""
