"""Rules of a configuration: their blocks and options.

The options of most rules are the arguments of datatrove's block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont import NGramsDecontConfig
from datatrove.pipeline.dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters import (
    C4ParagraphFilter,
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from lm.errors import UserError
from lm.tools.corpus.classifier_rule import Classifier
from lm.tools.corpus.corpus_sources import NamedSource
from lm.tools.corpus.decontamination import Decontamination, DecontaminationIndex
from lm.tools.corpus.document_sample import Sample, SampleKeys, SampleLimit
from lm.tools.corpus.rule_tally import CLUSTER, NO_CLUSTER
from lm.tools.corpus.text_blocks import BannedWords, ByLanguage, Language, PersonalData

BY_LANGUAGE = "by_language"  # option with language-specific overrides
ENGLISH = ("en",)  # languages of rules with English stop words, punctuation or thresholds
# Arguments that are not configuration options.
_OWN = ("self", "exclusion_writer")
_SHA1 = HashConfig(64, "sha1")  # xxhash 4 and later does not accept the text that datatrove passes


class Step(NamedTuple):
    """Block that runs after all earlier tasks have finished.

    Attributes:
        name: name for progress and logs.
        block: the block.
        tasks: number of tasks.
    """

    name: str
    block: PipelineStep
    tasks: int = 1


@dataclass(frozen=True)
class PlannedRule:
    """Blocks of a rule.

    Attributes:
        block: filter or formatter of documents.
        before: steps to run before any document is read.
        collect: block at the end of a stage that collects information about all documents.
        between: steps between that stage and the next one, which starts with `block`.
    """

    block: PipelineStep
    before: tuple[Step, ...] = ()
    collect: PipelineStep | None = None
    between: tuple[Step, ...] = ()


class RuleContext(NamedTuple):
    """Context of a rule, besides its options.

    Attributes:
        folder: folder for the rule's own files.
        words: tokenizer of words and sentences.
        tests: test sets by name.
    """

    folder: str
    words: WordTokenizer
    tests: Mapping[str, NamedSource]


class RuleKind(NamedTuple):
    """Kind of rule.

    Attributes:
        build: function of a context and of options by name.
        about: one sentence for `lm corpus --rules`.
        options: parameters that are options.
        digest: returns the digest of what the rule reads besides the sources, such as a word list,
            given the options; None if it reads nothing.
    """

    build: Callable[..., PlannedRule]
    about: str
    options: dict[str, inspect.Parameter]
    digest: Callable[..., str] | None = None


def _of_block(cls: type[PipelineStep], about: str) -> RuleKind:
    """Return the rule kind for a single block, datatrove's or ours."""
    parameters = dict(inspect.signature(cls.__init__).parameters)
    options = {name: parameters[name] for name in parameters if name not in (*_OWN, "language")}

    def build(context: RuleContext, **options: Any) -> PlannedRule:
        words = {"language": context.words} if "language" in parameters else {}
        return PlannedRule(cls(**options, **words))

    return RuleKind(build, about, options, getattr(cls, "digest_of", None))


def _by_language(block: type[BaseFilter], about: str, languages: tuple[str, ...]) -> RuleKind:
    """Return the rule kind for a filter with language-specific options.

    Args:
        block: datatrove's filter.
        about: one sentence for `lm corpus --rules`.
        languages: languages that its defaults fit; () for all.
    """
    kind, keyword = _of_block(block, about), inspect.Parameter.KEYWORD_ONLY
    named = {
        name: inspect.Parameter(name, keyword, default=default, annotation=annotation)
        for name, default, annotation in (
            ("languages", languages, "Sequence[str]"),
            (BY_LANGUAGE, {}, "Mapping"),
        )
    }

    def build(
        context: RuleContext,
        *,
        languages: Sequence[str],
        by_language: Mapping[str, Any],
        **options: Any,
    ) -> PlannedRule:
        common = kind.build(context, **options)
        if not languages and not by_language:
            return common
        others = {
            name: cast(BaseFilter, kind.build(context, **own).block)
            for name, own in by_language.items()
        }
        return PlannedRule(ByLanguage(cast(BaseFilter, common.block), languages, others))

    return RuleKind(build, about, named | kind.options)


def _of_function(build: Callable[..., PlannedRule], about: str) -> RuleKind:
    """Return the rule kind for a planning function, whose keyword arguments are the options."""
    parameters = inspect.signature(build).parameters.values()
    return RuleKind(build, about, {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY})


def _text_of(document: Document) -> str:
    return document.text


def _exact_duplicates(context: RuleContext) -> PlannedRule:
    config = ExactDedupConfig(_text_of, hash_config=_SHA1)
    signatures, found = f"{context.folder}/signatures", f"{context.folder}/found"
    return PlannedRule(
        ExactDedupFilter(found, config),
        collect=ExactDedupSignature(signatures, config),
        between=(Step("find", ExactFindDedups(signatures, found, config)),),
    )


class NearDuplicates(MinhashDedupFilter):
    """Near-duplicate filter that records clusters, or their absence, in every task."""

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        removals = f"{rank:06d}.remove"
        if self.data_folder.isfile(f"{rank:06d}.clusters") and not self.data_folder.isfile(
            removals
        ):
            self.data_folder.open(
                removals, "wb"
            ).close()  # datatrove would otherwise skip reading clusters
        for document in super().run(data, rank, world_size):
            document.metadata.setdefault(CLUSTER, NO_CLUSTER)
            yield document


def _near_duplicates(
    context: RuleContext,
    *,
    n_grams: int = 5,
    num_buckets: int = 20,
    hashes_per_bucket: int = 5,
    seed: int = 1,
) -> PlannedRule:
    """Plan MinHash: a pair with Jaccard similarity s is found with probability 1 - (1 - s^h)^b.

    The default finds half of the pairs that share 0.51 of their n-grams; experiments/RESULTS.md has
    the recall and precision of this and other settings (FineWeb's 14 × 8: half at 0.68).
    """
    if min(n_grams, num_buckets, hashes_per_bucket) < 1:
        raise UserError("n_grams, num_buckets and hashes_per_bucket must be at least 1")
    config = MinhashConfig(n_grams, num_buckets, hashes_per_bucket, seed, hash_config=_SHA1)
    signatures, pairs, clusters = (
        f"{context.folder}/{name}" for name in ("signatures", "pairs", "clusters")
    )
    find = MinhashDedupBuckets(signatures, pairs, config=config)
    cluster = MinhashDedupCluster(pairs, clusters, config, save_cluster_id=True)
    return PlannedRule(
        NearDuplicates(clusters, load_cluster_ids=True),
        collect=MinhashDedupSignature(signatures, config, context.words),
        between=(Step("find pairs", find, num_buckets), Step("cluster", cluster)),
    )


def _decontamination(context: RuleContext, *, n_grams: int = 13, shortest: int = 6) -> PlannedRule:
    if not context.tests:
        raise UserError('no test sets: set config.tests = {NAME: {"source": …}}')
    if not 1 <= shortest <= n_grams:
        raise UserError(f"shortest={shortest} is not from 1 to n_grams={n_grams}")
    config = NGramsDecontConfig(
        n_grams, find_query_ngrams=True, find_overlap_ngrams=False, hash_config=_SHA1
    )
    tests = tuple(context.tests.values())
    index = DecontaminationIndex(context.folder, tests, config, shortest, context.words)
    return PlannedRule(
        Decontamination(context.folder, config, shortest, context.words),
        before=(Step("index", index),),
    )


def _sample(
    context: RuleContext, *, fraction: float = 1.0, documents: int = 0, seed: int = 0
) -> PlannedRule:
    if not 0 < fraction <= 1:
        raise UserError(f"fraction={fraction} is not above 0 and at most 1")
    if documents < 0 or (documents and fraction < 1):
        raise UserError("set either fraction or documents to a number above 0")
    if not documents:
        return PlannedRule(Sample(fraction, seed))
    limit = SampleLimit(context.folder, documents)
    return PlannedRule(
        Sample(fraction, seed, context.folder),
        collect=SampleKeys(context.folder, seed),
        between=(Step("limit", limit),),
    )


RULES: dict[str, RuleKind] = {
    "language": _of_block(Language, "Keep documents in some languages (py3langid)."),
    "c4_quality": _by_language(C4QualityFilter, "C4's rules: remove lines and documents.", ENGLISH),
    "c4_paragraphs": _by_language(
        C4ParagraphFilter, "mC4's rule: 3 paragraphs of 200 characters.", ()
    ),
    "gopher_quality": _by_language(
        GopherQualityFilter, "Gopher's rules on words, lines and symbols.", ENGLISH
    ),
    "gopher_repetition": _by_language(GopherRepetitionFilter, "Gopher's rules on repetition.", ()),
    "fineweb_quality": _by_language(FineWebQualityFilter, "FineWeb's rules on lines.", ENGLISH),
    "personal_data": _of_block(PersonalData, "Mask e-mail, IP, phone, card numbers and IBANs."),
    "banned_words": _of_block(BannedWords, "Remove documents with a word from a word list."),
    "classifier": _of_block(
        Classifier, "Remove documents by class, predicted by a classifier run of `lm train`."
    ),
    "exact_duplicates": _of_function(_exact_duplicates, "Remove exact duplicates."),
    "near_duplicates": _of_function(
        _near_duplicates,
        "Remove near duplicates (MinHash, num_buckets × hashes_per_bucket).",
    ),
    "decontamination": _of_function(
        _decontamination, "Remove documents with n-grams or short texts of the test sets."
    ),
    "sample": _of_function(_sample, "Keep a random fraction or number of documents."),
}
