"""Metrics by name: of labels and numbers (scikit-learn, SciPy) and of texts.

A metric is a function from predictions and references of a whole split, one per example in the same
order, to named scores. Scores are in percent, as in papers; correlations (matthews, pearson,
spearman) are in [-1, 1]. A reference may be a list of alternatives: the best one counts. Text
metrics: BLEU, chrF (sacrebleu), ROUGE (rouge-score), exact match, SQuAD.
"""

from __future__ import annotations

import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from scipy import stats

from lm.config.registries import METRICS
from lm.data.records import split_words
from lm.errors import UserError, missing_package

_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


# Characters by script; the scripts after HANGUL have no spaces between words.
_KANA = r"[\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f]"
_HAN = r"[\u3005-\u3007\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
_HANGUL = r"[\u1100-\u11ff\u3130-\u318f\uac00-\ud7ff]"
_UNSPACED = r"[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\ua9e0-\ua9ff\uaa60-\uaa7f]"
_TOKENIZERS = {
    "Chinese": "zh",
    "Japanese": "ja-mecab",
    "Korean": "ko-mecab",
    "without spaces": "char",
}
_MECAB = {"ja-mecab": "mecab-python3", "ko-mecab": "mecab-ko"}


def score_predictions(
    names: Sequence[str],
    predictions: Sequence,
    references: Sequence,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, float | str]:
    """Compute the scores of all named metrics.

    Args:
        names: metrics.
        predictions: one per example.
        references: one per example, in the same order.
        settings: metric options by name, from section `eval` of the configuration; missing ones
            have their defaults.

    Raises:
        UserError: unknown metric, no examples, or different numbers of predictions and references.
    """
    if len(predictions) != len(references):
        raise UserError(
            f"{len(predictions)} predictions for {len(references)} references: "
            "both must cover the same examples in the same order"
        )
    if not len(references):
        raise UserError("nothing to score: no predictions and no references")
    scores: dict[str, float | str] = {}
    for name in names:
        declared = {
            field.name
            for other, entry in METRICS.entries.items()
            if entry.options and name in (other, *entry.shared_with)
            for field in fields(entry.options)
        }
        chosen = {key: value for key, value in (settings or {}).items() if key in declared}
        scores |= METRICS[name](predictions, references, **chosen)
    return scores


def alternatives(reference: Any) -> Sequence[Any]:
    """Return the accepted answers of an example: a list or tuple, or the single one."""
    return reference if isinstance(reference, list | tuple) else (reference,)


def single(references: Sequence) -> Sequence:
    """Return the references of a metric without alternatives; UserError if one is a list."""
    for number, reference in enumerate(references, start=1):
        if isinstance(reference, list | tuple):
            raise UserError(f"example {number} has several references, but this metric takes one")
    return references


def import_optional(module: str) -> Any:
    """Import a module of an optional library; UserError with its install command."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-").replace("sklearn", "scikit-learn")
        raise missing_package("this metric", package, "eval") from error


# --- labels and numbers


def accuracy(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Return the percentage of correct labels."""
    pairs = zip(predictions, references, strict=True)
    right = sum(prediction in alternatives(reference) for prediction, reference in pairs)
    return {"accuracy": 100 * right / len(predictions)}


def f1(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Return F1 of the positive class: the second of two labels in sorted order."""
    labels = sorted(set(single(references)))
    if len(labels) != 2:
        advice = "" if len(labels) == 1 else ": use macro_f1"
        raise UserError(f"f1 needs two labels, but the references have {len(labels)}{advice}")
    return {"f1": _f1_of_labels(predictions, references, labels[1:])}


def macro_f1(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Return F1 averaged over the labels that occur in predictions or references."""
    return {"macro_f1": _f1_of_labels(predictions, references, None)}


def _f1_of_labels(predictions: Sequence, references: Sequence, labels: list | None) -> float:
    f1_score = import_optional("sklearn.metrics").f1_score
    gold = single(references)
    score = f1_score(gold, predictions, labels=labels, average="macro", zero_division=0.0)
    return 100 * float(score)


def matthews(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Return the Matthews correlation of two or more labels; 0 if only one was predicted."""
    metrics = import_optional("sklearn.metrics")
    return {"matthews": float(metrics.matthews_corrcoef(single(references), predictions))}


def pearson(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Return Pearson's correlation of numbers; nan if one side is constant."""
    return {"pearson": _correlation(stats.pearsonr, predictions, references)}


def spearman(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Return Spearman's rank correlation, with ties at their mean rank; nan if undefined."""
    return {"spearman": _correlation(stats.spearmanr, predictions, references)}


def _correlation(
    function: Callable[[np.ndarray, np.ndarray], Any], predictions: Sequence, references: Sequence
) -> float:
    try:
        x, y = (np.asarray(side, np.float64) for side in (predictions, single(references)))
    except ValueError as error:
        raise UserError(f"a correlation needs numbers: {error}") from error
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(function(x, y).statistic)


# --- texts


def bleu(
    predictions: Sequence[str], references: Sequence, bleu_tokenizer: str = "auto"
) -> dict[str, float | str]:
    """Return BLEU of detokenized text, and sacrebleu's signature, which includes the tokenizer.

    If the script of the references requires another tokenizer than "13a" (WMT's for languages with
    spaces), "bleu_tokenizer" says which one and why.
    """
    why = ""
    if bleu_tokenizer == "auto":
        bleu_tokenizer, why = tokenizer_of_script(references)
    metrics = import_optional("sacrebleu.metrics")
    try:
        metric = metrics.BLEU(tokenize=bleu_tokenizer, force=bleu_tokenizer == "none")
    except RuntimeError:  # MeCab or its dictionary is missing
        package = _MECAB[bleu_tokenizer]
        raise missing_package("this BLEU tokenizer", package, "mecab") from None
    scores = _sacrebleu("bleu", metric, predictions, references)
    return scores | ({"bleu_tokenizer": why} if why else {})


def tokenizer_of_script(references: Sequence) -> tuple[str, str]:
    """Return sacrebleu's tokenizer for the script of references, and the reason as a line.

    A quarter of the letters suffices: a Chinese character is a word or half of one, so such a text
    is mostly Chinese. The line is empty for "13a". Without MeCab, Japanese and Korean are split
    into characters, so that hours of decoding are not lost.
    """
    text = "".join(chain.from_iterable(_texts(references)))
    n_letters = sum(character.isalpha() for character in text)
    kana, han, hangul, unspaced = (
        len(re.findall(script, text)) for script in (_KANA, _HAN, _HANGUL, _UNSPACED)
    )
    counts = {"Chinese": han, "Japanese": 0, "Korean": hangul, "without spaces": unspaced}
    if 10 * kana > han:  # Japanese text has about as many kana as kanji, Chinese hardly any kana
        counts |= {"Japanese": kana + han, "Chinese": 0}
    language = max(counts, key=counts.__getitem__)
    if 4 * counts[language] <= n_letters or not n_letters:
        return "13a", ""
    chosen = _TOKENIZERS[language]
    why = f"{language}: {min(counts[language] / n_letters, 1):.0%} of the letters of the references"
    if chosen in _MECAB and not _has_mecab(chosen):
        why += f"; characters, because {chosen} is not installed (extra mecab)"
        chosen = "char"
    return chosen, f"{chosen} ({why}; --config.eval.bleu_tokenizer)"


def _has_mecab(tokenizer: str) -> bool:
    try:
        import_optional("sacrebleu.metrics").BLEU(tokenize=tokenizer)
    except RuntimeError:
        return False
    return True


def bleu_tok(predictions: Sequence[str], references: Sequence) -> dict[str, float | str]:
    """Return BLEU of tokenized text, split at spaces only, as by multi-bleu.perl.

    Comparable only to values with the same tokenization and case.
    """
    metric = import_optional("sacrebleu.metrics").BLEU(tokenize="none", force=True)
    return _sacrebleu("bleu_tok", metric, predictions, references)


def chrf(predictions: Sequence[str], references: Sequence) -> dict[str, float | str]:
    """Return chrF2 (character 6-grams, no words) and sacrebleu's signature."""
    return _sacrebleu("chrf", import_optional("sacrebleu.metrics").CHRF(), predictions, references)


def _sacrebleu(
    name: str, metric: Any, predictions: Sequence[str], references: Sequence
) -> dict[str, float | str]:
    streams = [list(stream) for stream in zip_longest(*_texts(references))]
    score = metric.corpus_score(list(predictions), streams).score
    return {name: score, f"{name}_signature": str(metric.get_signature())}


def rouge(predictions: Sequence[str], references: Sequence) -> dict[str, float]:
    """Return the mean F-measure of ROUGE-1, -2, -L and -Lsum, without stemming.

    rougeL uses the longest common subsequence of the whole texts; rougeLsum works line by line,
    like "ROUGE-L" of CNN/DailyMail. Papers report the median of bootstrapped means, which equals
    this mean up to sampling noise.
    """
    return _rouge(predictions, references, stem=False)


def rouge_stemmed(predictions: Sequence[str], references: Sequence) -> dict[str, float]:
    """Return `rouge` with Porter stemming, as in PEGASUS's script and its AESLC results."""
    scores = _rouge(predictions, references, stem=True)
    return {f"{name}_stemmed": score for name, score in scores.items()}


def _rouge(predictions: Sequence[str], references: Sequence, stem: bool) -> dict[str, float]:
    scorer = import_optional("rouge_score.rouge_scorer").RougeScorer(_ROUGE, use_stemmer=stem)
    pairs = zip(_texts(references), predictions, strict=True)
    scores = [scorer.score_multi(texts, prediction) for texts, prediction in pairs]
    return {name: 100 * sum(s[name].fmeasure for s in scores) / len(scores) for name in _ROUGE}


def _texts(references: Sequence) -> list[Sequence[str]]:
    texts = [alternatives(reference) for reference in references]
    for number, several in enumerate(texts, start=1):
        if not several:
            raise UserError(f"example {number} has no reference: give it one or drop it")
    return texts


def exact_match(predictions: Sequence[str], references: Sequence) -> dict[str, float]:
    """Return the percentage of predictions that equal a reference, up to white space."""
    pairs = zip(predictions, references, strict=True)
    right = sum(
        prediction.split() in [text.split() for text in alternatives(reference)]
        for prediction, reference in pairs
    )
    return {"exact_match": 100 * right / len(predictions)}


def seqeval(predictions: Sequence[str], references: Sequence) -> dict[str, float]:
    """Return precision, recall and F1 of whole entities, and tag accuracy.

    Tags are BIO, separated by spaces; entities are those of conlleval (Tjong Kim Sang 2003).
    """
    metrics = import_optional("seqeval.metrics")
    gold = [split_words(text) for text in single(references)]
    found = [split_words(text) for text in predictions]
    return {
        "precision": 100 * float(metrics.precision_score(gold, found, zero_division=0)),
        "recall": 100 * float(metrics.recall_score(gold, found, zero_division=0)),
        "f1": 100 * float(metrics.f1_score(gold, found, zero_division=0)),
        "accuracy": 100 * float(metrics.accuracy_score(gold, found)),
    }


def squad(predictions: Sequence[str], references: Sequence) -> dict[str, float]:
    """Return SQuAD's exact match and F1, each the best over the example's answers.

    As in the official script of version 2, a question without answers (an empty list) has the
    answer "". Words are split at spaces, so for Chinese F1 is close to exact match.
    """
    exact = f1 = 0.0
    for prediction, reference in zip(predictions, references, strict=True):
        words = _words(prediction)
        answers = [answer for answer in map(_words, alternatives(reference)) if answer] or [[]]
        exact += words in answers
        f1 += max(_f1_of_words(words, answer) for answer in answers)
    return {
        "squad_exact_match": 100 * exact / len(predictions),
        "squad_f1": 100 * f1 / len(predictions),
    }


def _words(answer: str) -> list[str]:
    """Return the lowercase words, without ASCII punctuation and articles."""
    text = answer.lower().translate(_WITHOUT_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1_of_words(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    common = (Counter(prediction) & Counter(answer)).total()
    return 2 * common / (len(prediction) + len(answer))
