import pytest

from lm.evaluation.metrics.answer_scores import exact_match, squad


def scores(exact, f1):
    return pytest.approx({"squad_exact_match": exact, "squad_f1": f1})


def test_exact_match_squeezes_white_space_and_nothing_else():
    references = ["lambda $0 e ( city:t $0 )"] * 3
    predictions = [" lambda  $0 e\t( city:t $0 )\n", "Lambda $0 e ( city:t $0 )", "lambda $0 e"]
    assert exact_match(predictions, references)["exact_match"] == pytest.approx(100 / 3)


def test_exact_match_takes_any_of_several_references():
    assert exact_match(["b", "c"], [["a", "b"], ["a", "b"]]) == {"exact_match": 50.0}


def test_squad_of_t5s_qa_utils_test():
    answers = [["big moose", "hippo"], ["correct1"], ["correct2.1", "correct2.2"], ["a", "b"]]
    predictions = ["a big moose‘", "wrong", "correct2.2", "c"]
    assert squad(predictions, answers) == scores(25, 37.5)  # "moose‘" is not "moose"
    predictions[0] = "a big  Moose!"
    assert squad(predictions, answers) == scores(50, 50)


def test_squad_normalises_as_the_official_script():
    # T5's test_normalize_squad: punctuation goes before articles, only ASCII punctuation goes
    assert squad(
        ["`Needs\tA_LOT of the 'normalization'.\"‘"], ["needs alot of normalization‘"]
    ) == (scores(100, 100))
    assert squad(["Theatre an"], ["the theatre"]) == scores(100, 100)


def test_squad_f1_counts_repeated_words_as_often_as_they_occur():
    # common: x once and y once, of 3 predicted and 4 answer words
    assert squad(["x x y"], ["x y z w"]) == scores(0, 400 / 7)


def test_squad_takes_the_best_answer_for_each_score():
    assert squad(["abd"], [["abc abd", "$$$$"]]) == scores(0, 200 / 3)  # T5's test_qa_small


def test_squad_drops_answers_that_normalise_to_nothing():
    assert squad([""], [["abc", "$$$$"]]) == scores(0, 0)


def test_squad_without_answers_wants_the_empty_string():
    assert squad(["", "Paris", ""], [[], [], ["Paris"]]) == scores(100 / 3, 100 / 3)
