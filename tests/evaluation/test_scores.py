import sys

import pytest

from lm.config.registries import METRICS
from lm.errors import UserError
from lm.evaluation.scores import score_predictions


def test_score_predictions_joins_the_scores_of_all_names():
    names = ["rouge", "rouge_stemmed", "bleu", "bleu_tok", "chrf", "exact_match", "squad"]
    scores = score_predictions(names, ["a b c d e"], ["a b c d e"])
    assert set(scores) == {
        *("rouge1", "rouge2", "rougeL", "rougeLsum"),
        *("rouge1_stemmed", "rouge2_stemmed", "rougeL_stemmed", "rougeLsum_stemmed"),
        *("bleu", "bleu_signature", "bleu_tok", "bleu_tok_signature", "chrf", "chrf_signature"),
        *("exact_match", "squad_exact_match", "squad_f1"),
    }
    assert all(value == pytest.approx(100) for value in scores.values() if type(value) is float)


def test_unknown_name_is_told_the_nearest():
    with pytest.raises(UserError, match="unknown metric 'belu'; did you mean bleu"):
        score_predictions(["belu"], ["a"], ["a"])


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_rejects_what_does_not_match(name):
    with pytest.raises(UserError, match="1 predictions for 2 references"):
        score_predictions([name], ["a"], ["a", "b"])
    with pytest.raises(UserError, match="nothing to score"):
        score_predictions([name], [], [])


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("bleu", "sacrebleu.metrics", "sacrebleu"),
        ("rouge", "rouge_score.rouge_scorer", "rouge-score"),
        ("macro_f1", "sklearn.metrics", "scikit-learn"),
    ],
)
def test_missing_library_is_told_with_the_command_that_installs_it(
    monkeypatch, name, module, package
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"`{package}`: pip install .*\[eval\]'"):
        score_predictions([name], ["a"], ["a"])
