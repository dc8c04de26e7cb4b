import math

import pytest

from lm.errors import UserError
from lm.evaluation.scores import accuracy, f1, macro_f1, matthews, pearson, spearman


def test_accuracy_is_in_percent():
    # T5's metrics_test.py
    assert accuracy([0, 1, 2, 1], [0, 0, 2, 1]) == {"accuracy": 75.0}


def test_accuracy_accepts_any_reference():
    assert accuracy(["b", "b"], [["a", "b"], "a"]) == {"accuracy": 50.0}


@pytest.mark.parametrize("names", [(0, 1), ("0", "1"), ("negative", "positive")])
def test_f1_is_of_the_second_label(names):
    predictions = [names[i] for i in (1, 1, 1, 0, 0, 0)]
    references = [names[i] for i in (1, 0, 0, 1, 0, 0)]
    # precision 1/3, recall 1/2; of the first label it would be 4/7
    assert f1(predictions, references)["f1"] == pytest.approx(40)


def test_f1_counts_an_answer_that_is_no_label_as_not_positive():
    assert f1(["yes", "maybe", "no"], ["yes", "yes", "no"])["f1"] == pytest.approx(100 * 2 / 3)


def test_f1_without_positive_predictions_is_zero():
    assert f1([0, 0], [0, 1]) == {"f1": 0.0}


@pytest.mark.parametrize(("references", "found"), [([0, 1, 2], "3: use macro_f1"), ([1] * 3, "1")])
def test_f1_needs_two_labels(references, found):
    with pytest.raises(UserError, match=f"two labels, but the references have {found}"):
        f1([0, 0, 0], references)


def test_macro_f1_is_the_mean_over_labels():
    # T5's metrics_test.py: F1 of the three labels 2/3, 0 and 2/3
    assert macro_f1([0, 0, 2, 2], [0, 1, 1, 2])["macro_f1"] == pytest.approx(400 / 9)


def test_matthews_of_scikit_learns_documentation():
    # 2 true and 1 false positive, 1 false and no true negative: (2·0 - 1·1) / √(3·3·1·1)
    assert matthews([1, -1, 1, 1], [1, 1, 1, -1])["matthews"] == pytest.approx(-1 / 3)


def test_matthews_of_one_predicted_label_is_zero():
    assert matthews(["a", "a"], ["a", "b"]) == {"matthews": 0.0}


def test_correlations_of_scipys_documentation():
    pearsons = pearson([1, 2, 3, 4, 5], [10, 9, 2.5, 6, 4])
    assert pearsons["pearson"] == pytest.approx(-0.7426106572325056)
    spearmans = spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7])  # with a tie
    assert spearmans["spearman"] == pytest.approx(0.8207826816681233)


def test_spearman_sees_ranks_only():
    assert spearman([1, 2, 3], [1, 10, 1000])["spearman"] == pytest.approx(1)


def test_numbers_may_be_text():
    assert pearson(["0", "2", "4.0"], ["1", "3", "5"])["pearson"] == pytest.approx(1)
    with pytest.raises(UserError, match="could not convert string to float: 'good'"):
        pearson(["1", "good"], [1, 2])


@pytest.mark.parametrize("correlation", [pearson, spearman])
@pytest.mark.parametrize("predictions", [[0.5, 0.5], [0.5]])
def test_correlation_with_a_constant_is_undefined(correlation, predictions):
    (score,) = correlation(predictions, [0.0, 1.0][: len(predictions)]).values()
    assert math.isnan(score)


@pytest.mark.parametrize("metric", [f1, macro_f1, matthews, pearson, spearman])
def test_several_references_are_rejected_where_one_is_wanted(metric):
    with pytest.raises(UserError, match="example 2 has several references"):
        metric([0, 1], [0, [1, 1]])
