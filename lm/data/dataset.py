"""From the config's `data` section to tokenizer and stores, of documents or of records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lm.data.records.record_sources import Records, read_records, text_corpus
from lm.data.records.record_store import RecordStore, build_record_store
from lm.data.store import TokenStore, build_store
from lm.data.text.corpus import Corpus
from lm.data.text.sources import has_validation, open_corpus, sources
from lm.data.tokenizers.choice import FITTED, Tokenizer, choose_tokenizer
from lm.errors import UserError
from lm.storage import cache_directory

Store = TokenStore | RecordStore


@dataclass(frozen=True, eq=False)
class Dataset:
    """Everything that batches are made of.

    train, validation: stores of documents, or of a task's records.
    weights: one share a training store, or () for shares by number of tokens.
    fingerprint: digests of the tokenizer and of each source, to tell what changed on resume.
    """

    tokenizer: Tokenizer
    train: tuple[Store, ...]
    validation: tuple[Store, ...]
    weights: tuple[float, ...]
    fingerprint: dict[str, str]


def open_dataset(data: Any, records: bool = False, progress: bool = False) -> Dataset:
    """Opens tokenizer and stores of a `data` section, building what the cache does not hold.

    The sources hold documents, or with `records` a task's records. `validation` is empty if the
    section names no validation text. UserError for everything the section can get wrong.
    """
    training = _opened(data.source, data, "train", records)
    tokenizer = choose_tokenizer(data, _corpora(training))
    validation = _validation(data, records)
    fingerprint = {"tokenizer": tokenizer.digest}
    for split, opened in (("train", training), ("validation", validation)):
        fingerprint |= {f"{split} {source.name}": source.digest for source in opened}
    train, held_out = (
        tuple(_store(source, tokenizer, data, progress) for source in opened)
        for opened in (training, validation)
    )
    if _holds_out_records(data, records):
        train, held_out = zip(*(_divide(store, data) for store in train), strict=True)
    return Dataset(tokenizer, train, held_out, tuple(data.weights), fingerprint)


def open_tokenizer(data: Any, records: bool = False) -> Tokenizer:
    """The tokenizer of a `data` section; opens the training text only if it must be fitted."""
    training = _opened(data.source, data, "train", records) if data.tokenizer in FITTED else ()
    return choose_tokenizer(data, _corpora(training))


def open_split(
    data: Any, split: str, tokenizer: Tokenizer, records: bool, progress: bool = False
) -> tuple[Store, ...]:
    """The stores of the "validation" or "test" split under a tokenizer."""
    if split == "validation" and _holds_out_records(data, records):
        training = _opened(data.source, data, "train", records)
        stores = (_store(source, tokenizer, data, progress) for source in training)
        return tuple(_divide(store, data)[1] for store in stores)
    if split == "test":
        opened = _opened(data.test_source, data, "validation", records) if data.test_source else ()
    else:
        opened = _validation(data, records)
    if not opened:
        raise UserError(f"the configuration has no {split} data; set --config.data.{split}_source")
    return tuple(_store(source, tokenizer, data, progress) for source in opened)


def _validation(data: Any, records: bool) -> tuple[Corpus | Records, ...]:
    if data.validation_source:
        return _opened(data.validation_source, data, "validation", records)
    if records:
        return ()
    specs = (spec for spec in sources(data.source) if has_validation(spec, data))
    return tuple(open_corpus(spec, data, "validation") for spec in specs)


def _holds_out_records(data: Any, records: bool) -> bool:
    return records and bool(data.validation_fraction) and not data.validation_source


def _divide(store: Any, data: Any) -> tuple[RecordStore, RecordStore]:
    """All but a fixed random `data.validation_fraction` of a store's records, and that rest.

    Random, because the files of tasks are often sorted, by class or by difficulty.
    """
    border = int(len(store) * (1 - data.validation_fraction))
    if not 0 < border < len(store):
        raise UserError(
            f"--config.data.validation_fraction={data.validation_fraction} of "
            f"{store.manifest.source} leaves a split empty: it has {len(store)} records"
        )
    order = np.random.default_rng(0).permutation(len(store))
    return store.part(np.sort(order[:border])), store.part(np.sort(order[border:]))


def _opened(text: str, data: Any, split: str, records: bool) -> tuple[Corpus | Records, ...]:
    specs = sources(text)
    if records:
        return tuple(read_records(spec, data) for spec in specs)
    return tuple(open_corpus(spec, data, split) for spec in specs)


def _corpora(opened: tuple[Corpus | Records, ...]) -> tuple[Corpus, ...]:
    """What tokenizers are fitted on."""
    return tuple(
        text_corpus(source) if isinstance(source, Records) else source for source in opened
    )


def _store(source: Corpus | Records, tokenizer: Tokenizer, data: Any, progress: bool) -> Store:
    cache = cache_directory(data)
    if isinstance(source, Records):
        return build_record_store(source, tokenizer, cache, progress)
    return build_store(source, tokenizer, cache, data.workers, progress)
