"""Statistics of stores: sizes, lengths, frequent tokens and samples.

They cover the whole store, or a fixed random sample of a large one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm.config.registry import listed
from lm.data.dataset import build_store, open_dataset, open_sources
from lm.data.record_store import RecordStore
from lm.data.sharded_store import ShardedManifest
from lm.data.tokenizer import Tokenizer

QUANTILES = {"least": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "most": 1.0}
_DOCUMENTS = 20_000  # maximum documents whose lengths are sampled
_STRETCHES = 256  # maximum token ranges that are counted
_STRETCH = 8192
_SHOWN = 100  # tokens per sample


@dataclass(frozen=True)
class StoreStatistics:
    """Statistics of one store.

    Attributes:
        split: "train", "validation" or "test".
        source: name of its source.
        folder: its folder.
        n_shards: number of shard files.
        sizes: numbers of tokens, documents or columns, bytes and others, by name.
        lengths: token counts of sampled documents, or of record texts by column.
        counts: count of each id in sampled tokens.
        samples: decoded starts of some documents or columns.
    """

    split: str
    source: str
    folder: str
    n_shards: int
    sizes: dict[str, int]
    lengths: dict[str, np.ndarray]
    counts: np.ndarray
    samples: list[str]

    def quantiles(self) -> dict[str, dict[str, int]]:
        """Return quantiles of the lengths, by column."""
        return {
            column: {name: int(np.quantile(values, q)) for name, q in QUANTILES.items()}
            for column, values in self.lengths.items()
        }


def open_stores(
    data: Any, columns: tuple[str, ...], progress: bool
) -> tuple[Tokenizer, list[tuple[str, Any]]]:
    """Open the stores of all splits of a configuration; build missing ones.

    Args:
        data: section `data` of the configuration.
        columns: record columns of the sources; () for documents.
        progress: show progress bars on stderr.

    Returns:
        The tokenizer, and the stores with the names of their splits.
    """
    opened = open_dataset(data, columns, progress)
    stores: list[tuple[str, Any]] = [("train", store) for store in opened.train]
    stores += [("validation", store) for store in opened.validation]
    own = "validation" if columns else "test"
    for source in open_sources(listed(data.test_source), data, own, columns):
        stores.append(("test", build_store(source, opened.tokenizer, data, progress)))
    return opened.tokenizer, stores


def measure(split: str, store: Any, tokenizer: Tokenizer, n_samples: int) -> StoreStatistics:
    """Measure a store of tokens or records.

    Args:
        split: name of its split.
        store: the store.
        tokenizer: its tokenizer.
        n_samples: number of samples.
    """
    rng = np.random.default_rng(0)
    common = split, store.manifest.source, str(store.directory)
    if isinstance(store, RecordStore):
        return _of_records(store, tokenizer, n_samples, rng, common)
    manifest = store.manifest
    names = ("n_tokens", "n_documents", "n_bytes", "n_characters", "n_words")
    sizes = {name.removeprefix("n_"): getattr(manifest, name) for name in names}
    if not manifest.n_bytes:  # pretokenized files, whose text size is unknown
        sizes = {name: sizes[name] for name in ("tokens", "documents")}
    chosen = _choose(manifest.n_documents, _DOCUMENTS, rng)
    ends = np.stack([store.offsets[i : i + 2] for i in chosen.tolist()])
    samples = []
    for i in _choose(len(ends), n_samples, rng):
        start, end = ends[i].tolist()
        samples.append(tokenizer.decode(store.tokens[start : min(end, start + _SHOWN)].tolist()))
    n_shards = len(manifest.shards) if isinstance(manifest, ShardedManifest) else 1
    lengths = {"document": ends[:, 1] - ends[:, 0]}
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    n_stretches = -(-len(store.tokens) // _STRETCH)
    for i in _choose(n_stretches, _STRETCHES, rng).tolist():
        found = store.tokens[i * _STRETCH : (i + 1) * _STRETCH]
        counts += np.bincount(found, minlength=len(counts))[: len(counts)]
    return StoreStatistics(*common, n_shards, sizes, lengths, counts, samples)


def _of_records(
    store: RecordStore,
    tokenizer: Tokenizer,
    n_samples: int,
    rng: np.random.Generator,
    common: tuple[str, str, str],
) -> StoreStatistics:
    columns = list(store.manifest.n_tokens)
    lengths = {column: store.lengths(column) for column in columns}
    sizes = {"tokens": store.n_tokens, "records": len(store)} | _of_turns(store)
    for column in store.manifest.features:
        sizes[f"frames of {column}"] = int(store.lengths(column).sum())
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for i in _choose(len(store), _DOCUMENTS, rng).tolist():
        for found in store[i].tokens.values():
            counts += np.bincount(found, minlength=len(counts))[: len(counts)]
    samples = [
        " | ".join(
            f"{column}: {_text_and_turns(tokenizer, found, record.turns.get(column))}"
            for column, found in record.tokens.items()
        )
        for record in (store[i] for i in _choose(len(store), n_samples, rng).tolist())
    ]
    return StoreStatistics(*common, 1, sizes, lengths, counts, samples)


def _of_turns(store: RecordStore) -> dict[str, int]:
    """Return the sizes of conversations; truncated and dropped ones for the whole store."""
    manifest = store.manifest
    if not manifest.turns:
        return {}
    return {
        "target tokens": sum(int(store.n_targets(column).sum()) for column in manifest.turns),
        "records cut": manifest.n_cut,
        "records dropped": manifest.n_dropped,
        "tokens lost": manifest.n_lost,
    }


def _text_and_turns(tokenizer: Tokenizer, tokens: np.ndarray, turns: np.ndarray | None) -> str:
    """Return the start of a text; for a conversation with targets in ⟦⟧, followed by their ids."""
    if turns is None or not len(turns):
        return tokenizer.decode(tokens[:_SHOWN].tolist())
    # As much as is shown of a text, and more only if no target would be included.
    end = max(_SHOWN, int(turns[0, 0]) + _SHOWN // 2)
    borders = [int(x) for start, stop, _ in turns for x in (start, stop) if x < end]
    borders = [0, *borders, min(end, len(tokens))]
    parts = [tokens[start:stop].tolist() for start, stop in itertools.pairwise(borders)]
    texts = (
        f"⟦{tokenizer.decode(p)}⟧" if i % 2 else tokenizer.decode(p) for i, p in enumerate(parts)
    )
    ids = (
        f"⟦{' '.join(map(str, p))}⟧" if i % 2 else " ".join(map(str, p))
        for i, p in enumerate(parts)
    )
    return f"{''.join(texts)} | ids: {' '.join(ids)}"


def _choose(n: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """Return up to `most` of n indices, sorted."""
    return np.arange(n) if n <= most else np.sort(rng.choice(n, most, replace=False))
