import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers import tokenizer_ja_mecab as ja_mecab

from lm.errors import UserError
from lm.evaluation.scores import (
    bleu,
    bleu_tok,
    chrf,
    exact_match,
    rouge,
    rouge_stemmed,
    score_predictions,
    squad,
    tokenizer_of_script,
)

# The example of sacrebleu's README, with the figures printed there.
PREDICTIONS = [
    "The dog bit the man.",
    "It wasn't surprising.",
    "The man had just bitten him.",
]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def test_bleu_and_chrf_of_several_references_match_the_readme_of_sacrebleu():
    scores = bleu(PREDICTIONS, REFERENCES)
    assert scores["bleu"] == pytest.approx(48.53, abs=0.005)
    assert scores["bleu_signature"].startswith("nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|")
    scores = chrf(PREDICTIONS, REFERENCES)
    assert scores["chrf"] == pytest.approx(59.73, abs=0.005)
    assert scores["chrf_signature"].startswith("nrefs:2|case:mixed|eff:yes|nc:6|nw:0|space:no|")


def test_examples_may_have_different_numbers_of_references():
    scores = bleu(PREDICTIONS, [["The dog had bit the man."], *REFERENCES[1:]])
    assert scores["bleu"] == pytest.approx(29.44, abs=0.005)
    assert scores["bleu_signature"].startswith("nrefs:var|")


def test_bleu_tok_divides_at_spaces_only_and_bleu_divides_punctuation_too():
    prediction, reference = ["well-known words , and more ."], ["well-known words, and more ."]
    # Right are 4 of 6 words, 2 of 5 bigrams, 1 of 4 trigrams and 0 of 3 4-grams, smoothed to 1/2;
    # the reference is shorter, so there is no brevity penalty.
    expected = 100 * (4 / 6 * 2 / 5 * 1 / 4 * 0.5 / 3) ** 0.25
    scores = bleu_tok(prediction, reference)
    assert scores["bleu_tok"] == pytest.approx(expected)
    assert "tok:none" in scores["bleu_tok_signature"]
    assert bleu(prediction, reference)["bleu"] == pytest.approx(100)


def test_bleu_keeps_case_and_punishes_brevity():
    words = "a b c d e f g h"
    assert bleu_tok([words.upper()], [words])["bleu_tok"] < 10
    # exp(1 - 8/6): all n-grams right, two words too few
    assert bleu_tok(["a b c d e f"], [words])["bleu_tok"] == pytest.approx(71.6531, abs=1e-4)


def test_rouge_of_the_readme_of_rouge_score():
    scores = rouge(
        ["The quick brown dog jumps on the log."], ["The quick brown fox jumps over the lazy dog"]
    )
    # 6 of 8 predicted and of 9 reference words; 2 of 7 and 8 bigrams; subsequence of 5
    expected = {"rouge1": 12 / 17, "rouge2": 4 / 15, "rougeL": 10 / 17, "rougeLsum": 10 / 17}
    assert scores == pytest.approx({name: 100 * value for name, value in expected.items()})


def test_rouge_is_the_mean_over_examples_of_the_best_reference():
    scores = rouge(["meeting confirmed", "x"], [["lunch", "meeting confirmed"], "y"])
    assert scores["rouge1"] == pytest.approx(50)


def test_rouge_lsum_takes_the_lines_apart_and_rouge_l_does_not():
    scores = rouge(["c d\na b"], ["a b\nc d"])
    assert scores["rougeL"] == pytest.approx(50)
    assert scores["rougeLsum"] == pytest.approx(100)


def test_only_rouge_stemmed_stems():
    assert rouge(["meetings"], ["meeting"])["rouge1"] == 0
    assert rouge_stemmed(["meetings"], ["meeting"])["rouge1_stemmed"] == 100


def test_example_without_reference_is_named():
    with pytest.raises(UserError, match="example 2 has no reference"):
        bleu(["a", "b"], ["a", []])


def test_empty_predictions_score_nothing():
    assert bleu(["", ""], ["this is a string"] * 2)["bleu"] == 0
    assert rouge([""], ["this is a string"])["rougeLsum"] == 0


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


def test_squad_normalizes_as_the_official_script():
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


def test_squad_drops_answers_that_normalize_to_nothing():
    assert squad([""], [["abc", "$$$$"]]) == scores(0, 0)


def test_squad_without_answers_wants_the_empty_string():
    assert squad(["", "Paris", ""], [[], [], ["Paris"]]) == scores(100 / 3, 100 / 3)


SENTENCES = {
    "zh": ("我们明天去北京看长城。", "我们明天去上海看长城。"),
    "ja-mecab": ("私は明日東京で友達に会います。", "私は明日京都で友達に会います。"),
    "ko-mecab": ("나는 내일 서울에서 친구를 만난다.", "나는 내일 부산에서 친구를 만난다."),
    "char": ("พรุ่งนี้ฉันจะไปกรุงเทพ", "พรุ่งนี้ฉันจะไปเชียงใหม่"),
    "13a": ("We go to Beijing tomorrow to see the wall.", "We go to Shanghai to see the wall."),
}
NEIGHBORS = {
    "繁體中文的句子也沒有空格。": "zh",
    "用 PyTorch 训练 Transformer 模型的方法": "zh",
    "ソフトウェアのバージョン 2.0 をリリースしました": "ja-mecab",
    "ပြည်ထောင်စု မြန်မာနိုင်ငံတော်": "char",
    "ສະບາຍດີ ທ່ານສະບາຍດີບໍ": "char",
    "भारत एक देश है।": "13a",
    "Привет, мир!": "13a",
    "The word 北京 means northern capital, and 上海 above the sea, in Chinese.": "13a",
    "12.5 %": "13a",
    "": "13a",
}


@pytest.mark.parametrize("tokenizer", SENTENCES)
def test_bleu_is_tokenized_by_the_script_of_the_references(tokenizer):
    """As sacrebleu scores it with that tokenizer; a sentence is more than one word."""
    reference, prediction = SENTENCES[tokenizer]
    expected = BLEU(tokenize=tokenizer).corpus_score([prediction], [[reference]])
    found = bleu([prediction], [reference])
    assert found["bleu"] == pytest.approx(expected.score)
    assert f"|tok:{tokenizer}" in found["bleu_signature"]
    assert (tokenizer == "13a") == ("bleu_tokenizer" not in found)
    assert found.get("bleu_tokenizer", tokenizer).startswith(tokenizer)
    assert 5 < found["bleu"] < 100
    assert bleu([prediction], [[reference, reference]])["bleu"] == pytest.approx(found["bleu"])
    assert "|tok:13a" in bleu([prediction], [reference], bleu_tokenizer="13a")["bleu_signature"]


@pytest.mark.parametrize("text", NEIGHBORS)
def test_script_of_most_letters_decides(text):
    assert tokenizer_of_script([text])[0] == NEIGHBORS[text]


def test_without_mecab_japanese_is_scored_by_characters_and_said(monkeypatch):
    monkeypatch.setattr(ja_mecab, "MeCab", None)
    reference, prediction = SENTENCES["ja-mecab"]
    found = bleu([prediction], [reference])
    assert "|tok:char" in found["bleu_signature"]
    assert "ja-mecab is not installed (extra mecab)" in found["bleu_tokenizer"]
    with pytest.raises(UserError, match=r"`mecab-python3`: pip install .*\[mecab\]'"):
        bleu([prediction], [reference], bleu_tokenizer="ja-mecab")


def test_tokenizer_of_the_configuration_reaches_bleu_alone():
    reference, prediction = SENTENCES["zh"]
    settings = {"bleu_tokenizer": "char", "batch_size": 8}
    found = score_predictions(["bleu", "chrf"], [prediction], [reference], settings)
    assert "|tok:char" in found["bleu_signature"]
    assert found["chrf"] == chrf([prediction], [reference])["chrf"]
