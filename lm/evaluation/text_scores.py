"""Scores of texts in percent: BLEU, chrF (sacrebleu), ROUGE (rouge-score), exact match, SQuAD."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from lm.errors import UserError
from lm.evaluation.scores import alternatives, import_optional

_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def bleu(predictions: Sequence[str], references: Sequence) -> dict[str, float | str]:
    """Return BLEU of detokenized text, tokenized by "13a" as at WMT, and sacrebleu's signature."""
    metric = import_optional("sacrebleu.metrics").BLEU()
    return _sacrebleu("bleu", metric, predictions, references)


def bleu_tok(predictions: Sequence[str], references: Sequence) -> dict[str, float | str]:
    """Return BLEU of tokenized text, which is split at spaces only, as by multi-bleu.perl.

    It compares only with figures of the same tokenization and case.
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

    rougeL is of the longest common subsequence of the whole texts; rougeLsum goes line by line, as
    "ROUGE-L" of CNN/DailyMail does. Papers print the median of bootstrapped means, which this mean
    equals up to sampling noise.
    """
    return _rouge(predictions, references, stem=False)


def rouge_stemmed(predictions: Sequence[str], references: Sequence) -> dict[str, float]:
    """Return `rouge` of Porter-stemmed words, as PEGASUS's script and its AESLC figures."""
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
    """Return the share of predictions that equal a reference, up to white space."""
    pairs = zip(predictions, references, strict=True)
    right = sum(
        prediction.split() in [text.split() for text in alternatives(reference)]
        for prediction, reference in pairs
    )
    return {"exact_match": 100 * right / len(predictions)}


def squad(predictions: Sequence[str], references: Sequence) -> dict[str, float]:
    """Return SQuAD's exact match and F1, each the best over the example's answers.

    As in the official script of version 2, a question without answers (an empty list) has the
    answer "". Words are split at spaces, so F1 of Chinese is close to exact match.
    """
    exact = f1 = 0.0
    for prediction, reference in zip(predictions, references, strict=True):
        words = _words(prediction)
        answers = [answer for answer in map(_words, alternatives(reference)) if answer] or [[]]
        exact += words in answers
        f1 += max(_f1(words, answer) for answer in answers)
    return {
        "squad_exact_match": 100 * exact / len(predictions),
        "squad_f1": 100 * f1 / len(predictions),
    }


def _words(answer: str) -> list[str]:
    """Return the words in lower case, without ASCII punctuation and without articles."""
    text = answer.lower().translate(_WITHOUT_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    common = (Counter(prediction) & Counter(answer)).total()
    return 2 * common / (len(prediction) + len(answer))
