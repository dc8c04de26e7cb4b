"""Quality of samples without references: diversity, repetition, and perplexity under another run.

Words come from BLEU's tokenizer for the script of the samples, so that runs with different
vocabularies are comparable. Diversity depends on the number and length of samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import ClassVar

import jax
import numpy as np

from lm.decoding.prompts import is_encoder_decoder
from lm.decoding.sampling import Sampling
from lm.errors import UserError
from lm.evaluation.safety.samples import no_samples, sample_prompts, write_samples
from lm.evaluation.safety.suite import Figures, SafetySet, Subject
from lm.evaluation.scores import import_optional, tokenizer_of_script
from lm.runs.checkpoints import ignore_line
from lm.runs.saved_params import load_tokenizer, restore_run
from lm.storage import open_run_folder

_MOST_BLEU = 200  # maximum texts for self-BLEU, which takes quadratic time
_JUDGE_ROWS = 8


class Quality(SafetySet):
    """Diversity and repetition of samples, and their perplexity under a judge."""

    about: ClassVar = (
        "Samples (safety.temperature, safety.top_p), unprompted and as continuations of "
        "safety.prompts (“prompted”). distinct_n: distinct n-grams in percent of all words (Li et "
        "al. 2016). self_bleu: mean BLEU of a sample with all others as references (Zhu et al. "
        "2018); high if samples are similar. seq_rep_4: mean percentage of a sample's 4-grams "
        "that repeat an earlier one (Welleck et al. 2020). judge_perplexity and "
        "judge_bits_per_byte: of the samples under the run safety.judge, which also rates "
        "repetitive text as likely. All depend on number and length of the samples."
    )
    curves: ClassVar = tuple(
        name + suffix
        for suffix in ("", "_prompted")
        for name in ("distinct_1", "distinct_2", "self_bleu", "seq_rep_4")
    )

    def misfit(self, subject: Subject) -> str:
        if not find_spec("sacrebleu"):
            return "needs the extra `eval` (sacrebleu)"
        if subject.config.safety.judge:
            load_judge(subject.config.safety.judge)
        return no_samples(subject)

    def measure(self, subject: Subject) -> Figures:
        options = subject.config.safety
        judge = load_judge(options.judge) if options.judge else None
        sampling = Sampling(options.temperature, top_p=options.top_p)
        figures: Figures = {}
        for suffix, prompts in sample_prompts(subject).items():
            texts = write_samples(subject, prompts, sampling)
            found = text_figures(texts)
            if judge is not None:
                found |= judged(judge, prompts, texts)
            figures |= {f"{name}{suffix}": value for name, value in found.items()}
        return figures


def text_figures(texts: Sequence[str]) -> Figures:
    """Return number, mean length in words, diversity and repetition of texts; NaN if undefined."""
    tokenizer, _ = tokenizer_of_script(texts)
    metric = import_optional("sacrebleu.metrics").BLEU(tokenize=tokenizer, effective_order=True)
    words = [metric.tokenizer(text).split() for text in texts]
    return {
        "samples": len(texts),
        "words": float(np.mean([len(x) for x in words])) if words else math.nan,
        **{f"distinct_{n}": 100 * distinct(words, n) for n in (1, 2, 3)},
        "self_bleu": self_bleu(texts, metric),
        "seq_rep_4": 100 * repeated(words, 4),
    }


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Return distinct-n (Li et al. 2016): number of distinct n-grams divided by number of words.

    NaN without words.
    """
    n_words = sum(map(len, texts))
    found = {gram for words in texts for gram in _grams(words, n)}
    return len(found) / n_words if n_words else math.nan


def repeated(texts: Sequence[Sequence[str]], n: int) -> float:
    """Return seq-rep-n (Welleck et al. 2020): 1 - distinct n-grams / n-grams, averaged over texts.

    Texts shorter than n words are skipped; NaN if all are.
    """
    grams = [_grams(words, n) for words in texts if len(words) >= n]
    return float(np.mean([1 - len(set(x)) / len(x) for x in grams])) if grams else math.nan


def self_bleu(texts: Sequence[str], metric: object) -> float:
    """Return the mean BLEU of each text with the others as references (Zhu et al. 2018), 0 to 100.

    Of more than 200 texts, 200 evenly spaced ones are compared; NaN for fewer than two.

    Args:
        texts: texts.
        metric: BLEU of sacrebleu.
    """
    n = min(len(texts), _MOST_BLEU)
    some = [texts[i * len(texts) // n] for i in range(n)]
    if n < 2:
        return math.nan
    scores = [
        metric.sentence_score(text, [*some[:i], *some[i + 1 :]]).score  # type: ignore[attr-defined]
        for i, text in enumerate(some)
    ]
    return float(np.mean(scores))


def judged(judge: Subject, prompts: Sequence[str], texts: Sequence[str]) -> Figures:
    """Return the judge's perplexity per token and bits per byte of texts, given their prompts."""
    pairs = [pair for pair in zip(prompts, texts, strict=True) if pair[1]]
    nats = [x for scores in judge.score(pairs) for x in scores.log_likelihoods]
    if not nats:
        return {}
    total = -float(np.sum(nats, dtype=np.float64))
    n_bytes = sum(len(text.encode()) for _, text in pairs)
    return {
        "judge_perplexity": float(np.exp(total / len(nats))),
        "judge_bits_per_byte": total / math.log(2) / n_bytes,
    }


@cache
def load_judge(workdir: str) -> Subject:
    """Load a run as a judge of text likelihood, on all devices; results are cached.

    Raises:
        UserError: the run does not exist, or is not a language model.
    """
    n_rows = -(-_JUDGE_ROWS // jax.device_count()) * jax.device_count()
    folder = open_run_folder(workdir)
    overrides = {"eval.batch_size": str(n_rows)}
    experiment, params, _ = restore_run(folder, overrides, ignore_line, any_batch=True)
    judge = Subject(experiment, params, load_tokenizer(folder))
    if not judge.has_likelihoods or judge.is_encoder or is_encoder_decoder(experiment.model):
        name = f"{judge.config.model.family}, {judge.config.objective.name}"
        raise UserError(f"--config.safety.judge={workdir}: {name} is not a language model")
    return judge
