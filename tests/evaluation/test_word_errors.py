import pytest

from lm.errors import UserError
from lm.evaluation.scores import score_predictions
from lm.evaluation.word_errors import cer, normalize_transcript, wer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Hello,\tWORLD!\n", "hello world"),
        ("Don’t — “stop”… it's", "don't stop it's"),
        ("ﬁve ５", "five 5"),
        ("Größe 3,5 %", "größe 3 5"),
        ("हिन्दी।", "हिन्दी"),
        ("!?", ""),
    ],
)
def test_transcripts_are_compared_without_case_and_punctuation(text, expected):
    assert normalize_transcript(text) == expected


def test_rates_are_edits_over_the_length_of_all_references():
    """Word by word: 1 substitution, 1 deletion and 2 insertions of 6 words."""
    references = ["One two three.", "four", "five six"]
    predictions = ["one too three", "", "five six seven eight"]
    assert wer(predictions, references) == {"wer": pytest.approx(100 * 4 / 6)}
    assert wer(predictions, references, normalize_words=False)["wer"] == pytest.approx(100)
    assert cer(["abd"], ["abc"]) == {"cer": pytest.approx(100 / 3)}
    settings = {"normalize_words": False, "bleu_tokenizer": "13a"}
    found = score_predictions(["wer", "cer"], ["A b"], ["a b"], settings)
    assert found == {"wer": 50.0, "cer": pytest.approx(100 / 3)}
    assert score_predictions(["wer"], ["x", "A"], ["", "a"]) == {"wer": 100.0}


def test_parameters_without_a_rate_are_reported():
    with pytest.raises(UserError, match="needs references with words"):
        wer(["a"], ["..."])
    with pytest.raises(UserError, match="example 1 has several references"):
        cer(["a"], [["a", "b"]])
