"""From the config's `data` section to tokenizer and token stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lm.data.corpora import has_validation, open_corpus, sources
from lm.data.folders import cache_directory
from lm.data.pieces import Corpus
from lm.data.store import TokenStore, build_store
from lm.data.tokenizers import Tokenizer, choose_tokenizer
from lm.errors import UserError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Everything that batches are made of.

    weights: one share a training store, or () for shares by number of tokens.
    fingerprint: digests of the tokenizer and of each source, to tell what changed on resume.
    """

    tokenizer: Tokenizer
    train: tuple[TokenStore, ...]
    validation: tuple[TokenStore, ...]
    weights: tuple[float, ...]
    fingerprint: dict[str, str]

    @property
    def validation_bytes(self) -> int:
        """Size of the validation text in UTF-8 bytes."""
        return sum(store.manifest.n_bytes for store in self.validation)


def open_dataset(data: Any, progress: bool = False) -> Dataset:
    """Opens tokenizer and stores of a `data` section, building what the cache does not hold.

    `validation` is empty if the section names no validation text. UserError for everything the
    section can get wrong.
    """
    training, validation = _training_corpora(data), _validation_corpora(data)
    tokenizer = choose_tokenizer(data, training)
    cache = cache_directory(data)
    train, held_out = (
        tuple(build_store(corpus, tokenizer, cache, data.workers, progress) for corpus in corpora)
        for corpora in (training, validation)
    )
    fingerprint = {"tokenizer": tokenizer.digest}
    for split, corpora in (("train", training), ("validation", validation)):
        fingerprint |= {f"{split} {corpus.name}": corpus.digest for corpus in corpora}
    return Dataset(tokenizer, train, held_out, tuple(data.weights), fingerprint)


def open_tokenizer(data: Any) -> Tokenizer:
    """The tokenizer of a `data` section; opens the training text only if it must be fitted."""
    fitted = data.tokenizer in ("char", "sentencepiece")
    return choose_tokenizer(data, _training_corpora(data) if fitted else ())


def _training_corpora(data: Any) -> tuple[Corpus, ...]:
    specs = sources(data.source)
    if not specs:
        raise UserError("--config.data.source is empty: name a source, such as stdlib")
    weights = tuple(data.weights)
    if weights and (len(weights) != len(specs) or min(weights) <= 0):
        raise UserError(
            f"--config.data.weights={weights} must hold one positive number for each of the "
            f"{len(specs)} sources"
        )
    return tuple(open_corpus(spec, data, "train") for spec in specs)


def _validation_corpora(data: Any) -> tuple[Corpus, ...]:
    if data.validation_source:
        specs = sources(data.validation_source)
    else:
        specs = tuple(spec for spec in sources(data.source) if has_validation(spec, data))
    return tuple(open_corpus(spec, data, "validation") for spec in specs)
