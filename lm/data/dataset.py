"""Tokenizer and stores (of documents or records) for section `data` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from lm.config.registry import listed
from lm.data.sources import Corpus, find_source
from lm.data.store import TokenStore, build_token_store
from lm.data.tokenizer import Tokenizer, is_fitted, make_tokenizer
from lm.errors import UserError
from lm.storage import cache_directory, chosen_cache

if TYPE_CHECKING:  # imported at run time only for tasks
    from lm.data.record_store import RecordStore
    from lm.data.records import Records

ONE_STORE = 2**28  # bytes: corpora up to this size get a single, unsharded store

Columns: TypeAlias = tuple[str, ...]  # record columns that an objective reads; () for documents
Store: TypeAlias = "TokenStore | RecordStore"
Source: TypeAlias = "Corpus | Records"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Tokenizer and stores for batches.

    Attributes:
        tokenizer: tokenizer of the stores.
        train: training stores, of documents or of records.
        validation: validation stores; () if the configuration has no validation data.
        weights: mixture weight of each training store; () for weights by token count.
        fingerprint: digests of the tokenizer and of each source, compared when a run is resumed.
    """

    tokenizer: Tokenizer
    train: tuple[Store, ...]
    validation: tuple[Store, ...]
    weights: tuple[float, ...]
    fingerprint: dict[str, str]


def open_dataset(
    data: Any, columns: Columns = (), progress: bool = False, tokenizer: Tokenizer | None = None
) -> Dataset:
    """Open tokenizer and stores; build what is not in the cache.

    Args:
        data: section `data` of the configuration.
        columns: record columns that the objective reads; () for documents.
        progress: show progress bars on stderr.
        tokenizer: tokenizer of the section, if already open.

    Raises:
        UserError: a source or the tokenizer is unknown, missing, empty or damaged.
    """
    training = open_sources(listed(data.source), data, "train", columns)
    tokenizer = tokenizer or make_tokenizer(data, _corpora(training), columns)
    validation = open_validation(data, columns)
    train, held_out = (
        tuple(build_store(source, tokenizer, data, progress) for source in sources)
        for sources in (training, validation)
    )
    fingerprint = {"tokenizer": tokenizer.digest}  # after the stores, whose builders hash
    for split, sources in (("train", training), ("validation", validation)):
        fingerprint |= {f"{split} {source.name}": source.digest for source in sources}
        fingerprint |= {f"card {s.name}": s.card for s in sources if hasattr(s, "card") and s.card}
    if holds_out_records(data, columns):
        from lm.data.held_out import split_records

        train, held_out = zip(*(split_records(store, data) for store in train), strict=True)
    return Dataset(tokenizer, train, held_out, tuple(data.weights), fingerprint)


def open_tokenizer(data: Any, columns: Columns = ()) -> Tokenizer:
    """Open only the tokenizer, and the training text if it is fitted to that.

    For arguments see `open_dataset`.
    """
    specs = listed(data.source) if is_fitted(data.tokenizer) else []
    return make_tokenizer(data, _corpora(open_sources(specs, data, "train", columns)), columns)


def open_sources(specs: list[str], data: Any, split: str, columns: Columns) -> tuple[Source, ...]:
    """Open a split of each source, as documents or records."""
    if columns:
        from lm.data.records import open_records

        return tuple(open_records(spec, data, split, columns) for spec in specs)
    sources = tuple(open_corpus(spec, data, split) for spec in specs)
    if split != "train" or not data.canaries:
        return sources
    from lm.data.canaries import plant

    return plant(sources, data)


def open_validation(data: Any, columns: Columns) -> tuple[Source, ...]:
    """Open the validation sources; () if there are none."""
    if data.validation_source:
        return open_sources(listed(data.validation_source), data, "validation", columns)
    specs = [spec for spec in listed(data.source) if has_validation(spec, data, columns)]
    return open_sources(specs, data, "validation", columns)


def has_validation(spec: str, data: Any, columns: Columns = ()) -> bool:
    """Return whether a source has validation data; for records, whether it has its own split."""
    cls, argument = find_source(spec, "records" if columns else "documents")
    held_out = bool(data.validation_fraction) and not columns
    return held_out or cls.has_validation_split(argument, data)


def open_corpus(spec: str, data: Any, split: str) -> Corpus:
    """Open a split of one document source.

    A source without its own validation split assigns the fraction `data.validation_fraction` to
    "validation" and the rest to "train". If `data.validation_source` is set, nothing is held out
    and either name gives the whole source.

    Args:
        spec: NAME or NAME:ARGUMENT.
        data: section `data` of the configuration.
        split: "train", "validation" or "test"; "test" is the validation split if the source has its
            own, otherwise all of it.

    Raises:
        UserError: the source is unknown, missing or empty, or does not have the split.
    """
    cls, argument = find_source(spec, "documents")
    has_own = cls.has_validation_split(argument, data)
    whole = split == "test" or has_own or data.validation_source
    hold_out = not whole and bool(data.validation_fraction)
    if split == "validation" and not (data.validation_source or hold_out or has_own):
        raise UserError(
            f"{spec} has no validation split: set --config.data.validation_source "
            "or --config.data.validation_fraction"
        )
    own_split = "train" if hold_out or split == "train" else "validation"
    corpus: Corpus = cls(argument, data, own_split)
    if next(corpus.chunks(), None) is None:
        raise UserError(f"{spec} contains no text")
    if not hold_out:
        return corpus
    from lm.data.held_out import HeldOut

    return HeldOut(corpus, data.validation_fraction, split, data.validation_seed)


def holds_out_records(data: Any, columns: Columns) -> bool:
    """Return whether validation records are held out from the training stores."""
    if not columns or not data.validation_fraction or data.validation_source:
        return False
    return not any(has_validation(spec, data, columns) for spec in listed(data.source))


def _corpora(sources: tuple[Any, ...]) -> tuple[Corpus, ...]:
    """Return the corpora to fit a tokenizer on; for records, their texts."""
    return tuple(getattr(source, "record_texts", source) for source in sources)


def build_store(source: Any, tokenizer: Tokenizer, data: Any, progress: bool) -> Store:
    """Open the store of a source; build it if it is not in the cache.

    Args:
        source: documents or records.
        tokenizer: tokenizer of the store.
        data: section `data` of the configuration.
        progress: show a progress bar on stderr.
    """
    cache, whole = cache_directory(data), getattr(source, "corpus", source)
    if hasattr(whole, "build_store"):  # records, or token files, which need no tokenization
        return whole.build_store(source, tokenizer, data, progress)
    sizes = [part.size or 0 for part in whole.parts()]
    if (len(sizes) > 1 and sum(sizes) > ONE_STORE) or "://" in chosen_cache(data):
        from lm.data.sharded_store import open_sharded_store

        return open_sharded_store(source, tokenizer, data, progress)
    return build_token_store(source, tokenizer, cache, data.workers, progress)
