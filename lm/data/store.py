"""Token store: a corpus that is tokenized once, by any number of processes, and memory-mapped."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lm.config.experiment_file import import_plugins, registered_plugins
from lm.config.registries import TOKENIZERS
from lm.data.sources import CHUNK, Chunk, Corpus
from lm.data.tokenizers.tokenizer import Tokenizer
from lm.errors import UserError
from lm.storage import DamagedFolder, open_or_build, write_durably

_FORMAT = 3
_SMALL = 4 * CHUNK  # tokenizing this much text takes less time than starting processes


@dataclass(frozen=True)
class Manifest:
    """Origin and sizes of a token store.

    Attributes:
        format: version of the store's layout.
        source: name of the corpus.
        source_digest: digest of the corpus.
        tokenizer_digest: digest of the tokenizer.
        dtype: dtype of the tokens.
        n_tokens: tokens, special tokens included.
        n_documents: documents.
        n_bytes: bytes of the text in UTF-8.
        n_characters: characters of the text.
        n_words: words between white space.
        delimiter: token that both starts and ends documents; None if the tokenizer has none.
    """

    format: int
    source: str
    source_digest: str
    tokenizer_digest: str
    dtype: str
    n_tokens: int
    n_documents: int
    n_bytes: int
    n_characters: int
    n_words: int
    delimiter: int | None


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Tokens of a corpus, one document after the other.

    Attributes:
        directory: folder of the store.
        manifest: origin and sizes.
        tokens: [n_tokens] uint16 or uint32, memory-mapped.
        offsets: [n_documents + 1] int64; document i is tokens[offsets[i]:offsets[i + 1]]. If one
            id both starts and ends documents, that id follows the last document once more.
    """

    directory: Path
    manifest: Manifest
    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return self.manifest.n_tokens


def build_token_store(
    corpus: Corpus,
    tokenizer: Tokenizer,
    cache_directory: str | Path,
    workers: int = 0,
    progress: bool = False,
) -> TokenStore:
    """Open the token store of a corpus, tokenizing it first if the cache does not hold it.

    Args:
        corpus: documents.
        tokenizer: tokenizer of the documents.
        cache_directory: folder of the cache.
        workers: processes, 0 for one a core; the tokens do not depend on it.
        progress: show a progress bar on stderr.

    Returns:
        The store.

    Raises:
        UserError: text cannot be read or encoded, or the disk is full.
    """
    recipe = json.dumps([_FORMAT, tokenizer.digest, corpus.digest])
    key = hashlib.sha256(recipe.encode()).hexdigest()[:32]
    return open_or_build(
        Path(cache_directory) / "stores" / key,
        _open,
        lambda folder: _write(folder, corpus, tokenizer, workers, progress),
    )


def _write(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, workers: int, progress: bool
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    n_tokens = n_documents = n_bytes = n_characters = n_words = 0
    bar = tqdm(
        desc=f"tokenizing {corpus.name}",
        total=corpus.size,
        unit="B",
        unit_scale=True,
        disable=not progress,
    )
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "offsets.bin", "wb") as offsets:
        with bar:
            for block in tokenize_chunks(corpus.chunks(), tokenizer, dtype, workers):
                tokens.write(block.tokens.tobytes())
                offsets.write((block.starts + n_tokens).tobytes())
                n_tokens += len(block.tokens)
                n_documents += len(block.starts)
                n_bytes += block.n_bytes
                n_characters += block.n_characters
                n_words += block.n_words
                bar.update(block.n_bytes)
        if n_tokens == 0:
            raise UserError(f"{corpus.name} holds no tokens")
        offsets.write(np.int64(n_tokens).tobytes())
        if tokenizer.bos_id is not None and tokenizer.bos_id == tokenizer.eos_id:
            tokens.write(np.asarray([tokenizer.bos_id], dtype).tobytes())
            n_tokens += 1
        for file in (tokens, offsets):
            file.flush()
            os.fsync(file.fileno())
    manifest = Manifest(
        format=_FORMAT,
        source=corpus.name,
        source_digest=corpus.digest,
        tokenizer_digest=tokenizer.digest,
        dtype=dtype.name,
        n_tokens=n_tokens,
        n_documents=n_documents,
        n_bytes=n_bytes,
        n_characters=n_characters,
        n_words=n_words,
        delimiter=tokenizer.bos_id if tokenizer.bos_id == tokenizer.eos_id else None,
    )
    write_durably(folder / "manifest.json", json.dumps(asdict(manifest), indent=2).encode())


def _open(folder: Path) -> TokenStore:
    try:
        manifest = Manifest(**json.loads((folder / "manifest.json").read_bytes()))
        tokens = map_array(folder / "tokens.bin", manifest.dtype, manifest.n_tokens)
        offsets = map_array(folder / "offsets.bin", "int64", manifest.n_documents + 1)
    except (OSError, ValueError, TypeError) as error:
        raise DamagedFolder(f"{type(error).__name__}: {error}") from error
    return TokenStore(folder, manifest, tokens, offsets)


def map_array(path: Path, dtype: str, length: int) -> np.ndarray:
    """Memory-map a file of `length` numbers; DamagedFolder if it has another size."""
    expected = length * np.dtype(dtype).itemsize
    if path.stat().st_size != expected:
        raise DamagedFolder(f"{path.name} has {path.stat().st_size} bytes instead of {expected}")
    # As a plain array, because slicing a np.memmap is several times slower.
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


@dataclass(frozen=True)
class TokenBlock:
    """Tokens of consecutive chunks, and the offsets of the documents that start among them."""

    tokens: np.ndarray  # [n] of the store's dtype
    starts: np.ndarray  # [documents], int64
    n_bytes: int  # of UTF-8 text
    n_characters: int
    n_words: int  # between white space


def tokenize_chunks(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, dtype: np.dtype, workers: int
) -> Iterator[TokenBlock]:
    """Yield blocks of tokens in the order of the chunks.

    Args:
        chunks: chunks of all documents.
        tokenizer: tokenizer; that of a plug-in is imported by the worker processes too.
        dtype: dtype of the tokens.
        workers: processes, 0 for one a core; a small corpus is tokenized in this process. The
            concatenation of the blocks does not depend on it.
    """
    workers = workers or os.cpu_count() or 1
    groups = _group(chunks)
    head, size = [], 0
    for group in groups:
        head.append(group)
        size += sum(len(chunk.text) for chunk in group)
        if size > _SMALL:
            break
    groups = chain(head, groups)
    if workers == 1 or size <= _SMALL:
        for group in groups:
            yield _encode(tokenizer, dtype, group)
    else:
        yield from _in_processes(groups, tokenizer, dtype, workers)


def _group(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Group chunks to about 2**20 characters, enough to be worth sending to a worker."""
    group: list[Chunk] = []
    size = 0
    for chunk in chunks:
        group.append(chunk)
        size += len(chunk.text)
        if size >= CHUNK:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encode(tokenizer: Tokenizer, dtype: np.dtype, group: list[Chunk]) -> TokenBlock:
    parts: list[np.ndarray] = []
    starts: list[int] = []
    n = n_bytes = n_characters = n_words = 0
    for chunk in group:
        tokens = _with_special_tokens(tokenizer, chunk)
        # A document without tokens, such as spaces under a vocabulary that drops them, is left out.
        if chunk.first and (len(tokens) or not chunk.last):
            starts.append(n)
        parts.append(tokens.astype(dtype))
        n += len(tokens)
        n_bytes += len(chunk.text.encode())
        n_characters += len(chunk.text)
        n_words += len(chunk.text.split())
    borders = np.asarray(starts, np.int64)
    return TokenBlock(np.concatenate(parts), borders, n_bytes, n_characters, n_words)


def _with_special_tokens(tokenizer: Tokenizer, chunk: Chunk) -> np.ndarray:
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    tokens = tokenizer.encode(chunk.text)
    before = [bos] if chunk.first and bos is not None else []
    # Where a newline is the eos, a last newline has ended the document already.
    ended = len(tokens) > 0 and tokens[-1] == eos
    after = [eos] if chunk.last and eos is not None and eos != bos and not ended else []
    if not before and not after:
        return tokens
    return np.concatenate([np.asarray(part, np.int32) for part in (before, tokens, after)])


_worker_state: tuple[Tokenizer, np.dtype]


def _start_worker(plugins: list[dict[str, Any]], tokenizer: bytes, dtype: np.dtype) -> None:
    global _worker_state
    import_plugins(plugins, {})  # before unpickling, which looks the tokenizer's class up
    _worker_state = pickle.loads(tokenizer), dtype


def _encode_in_worker(group: list[Chunk]) -> TokenBlock:
    return _encode(*_worker_state, group)


def _in_processes(
    groups: Iterator[list[Chunk]], tokenizer: Tokenizer, dtype: np.dtype, workers: int
) -> Iterator[TokenBlock]:
    # Spawned, because JAX has threads and a forked process may inherit a lock that one holds.
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        _start_worker,
        (_tokenizer_plugins(), pickle.dumps(tokenizer), dtype),
    )
    try:
        waiting = deque(
            pool.submit(_encode_in_worker, group) for group in islice(groups, 2 * workers)
        )
        while waiting:
            block = waiting.popleft().result()
            waiting.extend(pool.submit(_encode_in_worker, group) for group in islice(groups, 1))
            yield block
    except BrokenProcessPool as error:
        raise UserError(
            "a tokenizing process was killed, perhaps for lack of memory: "
            "use fewer --config.data.workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _tokenizer_plugins() -> list[dict[str, Any]]:
    """Return the imported plug-ins that register a tokenizer."""
    return [p for p in registered_plugins() if TOKENIZERS.kind in p["registers"]]
