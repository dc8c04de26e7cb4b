"""Quality of samples: the papers' formulas computed by hand, and the set on a run."""

import json
import math

import numpy as np
import pytest

from lm.api import load_run
from lm.evaluation.safety.quality import distinct, judged, load_judge, repeated, text_figures
from lm.evaluation.safety.suite import Subject


def test_distinct_and_repeated_n_grams_by_hand():
    texts = [["a", "b", "a", "b"], ["a", "b", "c"]]
    assert distinct(texts, 1) == 3 / 7  # a, b, c among seven words
    assert distinct(texts, 2) == 3 / 7  # ab, ba, bc; the denominator is that of words
    assert math.isnan(distinct([[], []], 1))
    assert repeated(texts, 2) == pytest.approx((1 / 3 + 0) / 2)  # ab, ba, ab; ab, bc
    assert repeated([list("abcdabcd"), ["a"]], 4) == pytest.approx(1 / 5)  # abcd twice of five
    assert math.isnan(repeated([["a"]], 4))


def test_self_bleu_by_hand():
    same = text_figures(["the cat sat on the mat"] * 3)
    assert same["self_bleu"] == pytest.approx(100)
    assert same["distinct_1"] == pytest.approx(100 * 5 / 18)
    assert text_figures(["a b c d", "e f g h"])["self_bleu"] < 20  # smoothed zeros
    # Precisions 3/4, 2/3, 1/2 and, smoothed (sacrebleu's exp), 1/2 of none; lengths are equal.
    half = text_figures(["a b c d", "a b c e"])["self_bleu"]
    assert half == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)
    assert math.isnan(text_figures(["alone"])["self_bleu"])
    assert math.isnan(text_figures([])["distinct_1"])


def test_words_match_the_script():
    assert text_figures(["我们在北京", "他们在上海"])["words"] == 5
    assert text_figures(["Yes, it is."])["words"] == 5


def test_quality_of_a_run_under_a_judge(evaluate, run_folder, safety_data):
    (safety_data / "quality.txt").write_text("the model\nevery token\n")
    keys = {"safety.samples": 4, "safety.new_tokens": 8, "safety.prompts": "quality.txt"}
    keys |= {"safety.judge": run_folder}
    found = json.loads(evaluate("--safety", "quality", "--json", **keys))
    figures = {name.removeprefix("eval/safety/quality/"): value for name, value in found.items()}
    assert [figures["samples"], figures["samples_prompted"]] == [4, 2]
    for name in ("distinct_1", "self_bleu", "distinct_2_prompted"):
        assert 0 <= figures[name] <= 100
    # One byte a token: bits per byte and perplexity are the same figure.
    for suffix in ("", "_prompted"):
        bits = figures[f"judge_bits_per_byte{suffix}"]
        assert 2**bits == pytest.approx(figures[f"judge_perplexity{suffix}"])
    greedy = json.loads(
        evaluate("--safety", "quality", "--json", **keys | {"safety.temperature": 0})
    )
    assert greedy["eval/safety/quality/self_bleu"] in (0, pytest.approx(100))  # all are the same
    page = (run_folder / "eval" / "safety" / "index.html").read_text()
    assert "Welleck et al. 2020" in page


def test_judge_scores_what_its_run_scores(run_folder):
    run, pairs = load_run(run_folder), [("the ", "model"), ("", "the small model reads " * 5)]
    found, expected = (
        load_judge(str(run_folder)),
        Subject(run.experiment, run.params, run.tokenizer),
    )
    scores = [
        np.concatenate([x.log_likelihoods for x in y.score(pairs)]) for y in (found, expected)
    ]
    np.testing.assert_allclose(*scores, rtol=1e-5)
    figures = judged(found, *zip(*pairs, strict=True))
    assert figures["judge_perplexity"] == pytest.approx(np.exp(-np.mean(scores[1])))
    assert figures["judge_bits_per_byte"] == pytest.approx(-scores[1].sum() / np.log(2) / 115)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"safety.judge": "nowhere"}, "nowhere"),
        ({"safety.prompts": "no_file.txt"}, "no_file.txt"),
        ({"safety.top_p": 0}, "is below"),
    ],
)
def test_bad_options_of_quality_are_one_line_errors(evaluate, keys, message):
    assert message in evaluate("--safety", "quality", **{"safety.new_tokens": 1} | keys)
