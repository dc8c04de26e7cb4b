"""Scores of generated text, in percent: BLEU and chrF (sacrebleu), ROUGE (rouge-score)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from lm.errors import UserError
from lm.evaluation.metrics.metric_inputs import alternatives, library

_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def bleu(predictions: Sequence[str], references: Sequence) -> dict[str, float | str]:
    """BLEU of detokenised text, tokenised by "13a" as at WMT, and sacrebleu's signature of it."""
    metric = library("sacrebleu.metrics").BLEU()
    return _sacrebleu("bleu", metric, predictions, references)


def bleu_tok(predictions: Sequence[str], references: Sequence) -> dict[str, float | str]:
    """BLEU of text that is tokenised already, divided at spaces only, as multi-bleu.perl does.

    Comparable only with figures of the same tokenisation and case.
    """
    metric = library("sacrebleu.metrics").BLEU(tokenize="none", force=True)
    return _sacrebleu("bleu_tok", metric, predictions, references)


def chrf(predictions: Sequence[str], references: Sequence) -> dict[str, float | str]:
    """chrF2 (character 6-grams, no words) and sacrebleu's signature of it."""
    return _sacrebleu("chrf", library("sacrebleu.metrics").CHRF(), predictions, references)


def _sacrebleu(
    name: str, metric: Any, predictions: Sequence[str], references: Sequence
) -> dict[str, float | str]:
    streams = [list(stream) for stream in zip_longest(*_texts(references))]
    score = metric.corpus_score(list(predictions), streams).score
    return {name: score, f"{name}_signature": str(metric.get_signature())}


def rouge(predictions: Sequence[str], references: Sequence) -> dict[str, float]:
    """Mean ROUGE-1, -2, -L and -Lsum F-measure without stemming; of several references the best.

    rougeL is the longest common subsequence of the whole texts; rougeLsum takes line by line,
    the "ROUGE-L" of CNN/DailyMail. Papers print the median of bootstrapped means, which this
    mean equals but for sampling noise.
    """
    return _rouge(predictions, references, stem=False)


def rouge_stemmed(predictions: Sequence[str], references: Sequence) -> dict[str, float]:
    """`rouge` of Porter-stemmed words: PEGASUS's evaluation script, so its AESLC figures."""
    scores = _rouge(predictions, references, stem=True)
    return {f"{name}_stemmed": score for name, score in scores.items()}


def _rouge(predictions: Sequence[str], references: Sequence, stem: bool) -> dict[str, float]:
    scorer = library("rouge_score.rouge_scorer").RougeScorer(_ROUGE, use_stemmer=stem)
    pairs = zip(_texts(references), predictions, strict=True)
    scores = [scorer.score_multi(texts, prediction) for texts, prediction in pairs]
    return {name: 100 * sum(s[name].fmeasure for s in scores) / len(scores) for name in _ROUGE}


def _texts(references: Sequence) -> list[Sequence[str]]:
    texts = [alternatives(reference) for reference in references]
    for number, several in enumerate(texts, start=1):
        if not several:
            raise UserError(f"example {number} has no reference: give it one or drop it")
    return texts
