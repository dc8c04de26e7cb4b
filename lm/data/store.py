"""Token store: a corpus that is tokenized once and memory-mapped, and its windows.

A window, the unit of random access, holds length + 1 tokens, so that shifting by one gives inputs
and targets.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import numpy as np

from lm.data.sources import CHUNK, Chunk, Corpus
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.progress import progress_bar
from lm.storage import DamagedFolder, open_or_build, read_json, write_durably

_FORMAT = 4
BLOCK = 2**24  # bytes per checksum
_BLOCKS_READ = 64  # blocks per file that are verified when it is opened
_SMALL = 4 * CHUNK  # below this size, tokenizing is faster than starting processes


@dataclass(frozen=True)
class Manifest:
    """Origin and sizes of a token store.

    Attributes:
        format: version of the store's layout.
        source: name of the corpus.
        source_digest: digest of the corpus.
        tokenizer_digest: digest of the tokenizer.
        dtype: dtype of the tokens.
        n_tokens: number of tokens, including special tokens.
        n_documents: number of documents.
        n_bytes: bytes of UTF-8 text.
        n_characters: number of characters.
        n_words: number of whitespace-separated words.
        delimiter: token that both starts and ends documents; None if there is none.
        checksums: CRC-32 of each block of each file.
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
    checksums: dict[str, list[int]]


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Tokens of a corpus, with its documents concatenated.

    Attributes:
        directory: folder of the store.
        manifest: origin and sizes.
        tokens: [n_tokens] uint16 or uint32, memory-mapped.
        offsets: [n_documents + 1] int64; document i is tokens[offsets[i]:offsets[i + 1]]. If the
            same id starts and ends documents, it follows the last document once more.
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
    """Open the token store of a corpus; tokenize it first if it is not in the cache.

    Args:
        corpus: documents.
        tokenizer: tokenizer of the documents.
        cache_directory: folder of the cache.
        workers: number of processes, 0 for one per core; does not affect the result.
        progress: show a progress bar on stderr.

    Returns:
        The store.

    Raises:
        UserError: text cannot be read or encoded, or the disk is full.
    """
    return open_or_build(
        Path(cache_directory) / "stores" / store_key(corpus.digest, tokenizer.digest),
        partial(open_token_store, source=corpus.name),
        lambda folder: _write(folder, corpus, tokenizer, workers, progress),
    )


def store_key(corpus_digest: str, tokenizer_digest: str) -> str:
    """Return the folder name of a store."""
    recipe = json.dumps([_FORMAT, tokenizer_digest, corpus_digest])
    return hashlib.sha256(recipe.encode()).hexdigest()[:32]


def _write(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, workers: int, progress: bool
) -> None:
    dtype = token_dtype(tokenizer)
    sizes = np.zeros(5, np.int64)
    name = f"tokenizing {corpus.name}"
    bar = progress_bar(name, corpus.size, shown=progress, unit="B", unit_scale=True)
    paths = folder / "tokens.bin", folder / "offsets.bin"
    with open(paths[0], "wb") as tokens, open(paths[1], "wb") as offsets, bar:
        for block in tokenize_chunks(corpus.chunks(), tokenizer, dtype, workers):
            tokens.write(block.tokens.tobytes())
            offsets.write((block.starts + sizes[0]).tobytes())
            sizes += block.sizes
            bar.update(block.n_bytes)
        offsets.write(sizes[0].tobytes())
        if delimiter(tokenizer) is not None:
            tokens.write(np.asarray([tokenizer.bos_id], dtype).tobytes())
        for file in (tokens, offsets):
            file.flush()
            os.fsync(file.fileno())
    manifest = make_manifest(corpus, tokenizer, sizes, store_checksums(folder))
    write_durably(folder / "manifest.json", json.dumps(asdict(manifest), indent=2).encode())


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Return the dtype of stored tokens."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def delimiter(tokenizer: Tokenizer) -> int | None:
    """Return the id that both starts and ends documents, or None."""
    return tokenizer.bos_id if tokenizer.bos_id == tokenizer.eos_id else None


def make_manifest(
    corpus: Corpus, tokenizer: Tokenizer, sizes: np.ndarray, checksums: dict[str, list[int]]
) -> Manifest:
    """Return the manifest of a store with these total sizes (see `TokenBlock.sizes`)."""
    if not sizes[0]:
        raise UserError(f"{corpus.name} contains no tokens")
    n, n_documents, n_bytes, n_characters, n_words = sizes.tolist()
    origin = corpus.name, corpus.digest, tokenizer.digest, token_dtype(tokenizer).name
    totals = n + (delimiter(tokenizer) is not None), n_documents, n_bytes, n_characters, n_words
    return Manifest(_FORMAT, *origin, *totals, delimiter(tokenizer), checksums)


def open_token_store(folder: Path, source: str) -> TokenStore:
    """Open an unsharded store; DamagedFolder if it is damaged.

    Args:
        folder: the store.
        source: name of the corpus; the store may have been built from another one of equal content.
    """
    try:
        manifest = Manifest(**(read_json(folder / "manifest.json") | {"source": source}))
        require_checksums(folder, manifest.checksums)
        tokens = map_array(folder / "tokens.bin", manifest.dtype, manifest.n_tokens)
        offsets = map_array(folder / "offsets.bin", "int64", manifest.n_documents + 1)
    except (OSError, ValueError, TypeError, AttributeError, UserError) as error:
        raise DamagedFolder(f"{type(error).__name__}: {error}") from error
    return TokenStore(folder, manifest, tokens, offsets)


def store_checksums(folder: Path) -> dict[str, list[int]]:
    """Return the CRC-32 of each block of a store's binary files, by file name."""
    return {path.name: _checksums(path) for path in sorted(folder.glob("*.bin"))}


def _checksums(path: Path, blocks: Iterable[int] | None = None) -> list[int]:
    """Return the CRC-32 of some blocks of a file, by default of all."""
    n_blocks = -(-path.stat().st_size // BLOCK)
    found = []
    with open(path, "rb") as file:
        for block in range(n_blocks) if blocks is None else blocks:
            file.seek(block * BLOCK)
            found.append(zlib.crc32(file.read(BLOCK)))
    return found


def require_checksums(folder: Path, expected: dict[str, list[int]]) -> None:
    """Raise DamagedFolder, naming the file, if a store's files do not match their checksums.

    For files of more than 1 GiB, a random subset of the blocks is verified at each start.
    """
    if {path.name for path in folder.glob("*.bin")} != expected.keys():
        raise DamagedFolder("a file is missing or was added")
    for name, checksums in expected.items():
        n = len(checksums)
        blocks = sorted(random.SystemRandom().sample(range(n), min(n, _BLOCKS_READ)))
        if _checksums(folder / name, blocks) != [checksums[block] for block in blocks]:
            raise DamagedFolder(f"{name} does not match its checksum")


def map_array(path: Path, dtype: str, length: int) -> np.ndarray:
    """Memory-map a file of `length` numbers; DamagedFolder if its size differs."""
    expected = length * np.dtype(dtype).itemsize
    if path.stat().st_size != expected:
        raise DamagedFolder(f"{path.name} has {path.stat().st_size} bytes instead of {expected}")
    # As a plain array: slicing a np.memmap is several times slower.
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


@dataclass(frozen=True)
class TokenBlock:
    """Tokens of consecutive chunks, and the offsets of documents that start among them."""

    tokens: np.ndarray  # [n] of the store's dtype
    starts: np.ndarray  # [documents], int64
    n_bytes: int  # of UTF-8 text
    n_characters: int
    n_words: int  # between white space

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens, documents, bytes, characters and words, in the order of `Manifest`."""
        return len(self.tokens), len(self.starts), self.n_bytes, self.n_characters, self.n_words


def tokenize_chunks(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, dtype: np.dtype, workers: int
) -> Iterator[TokenBlock]:
    """Yield blocks of tokens in the order of the chunks.

    Args:
        chunks: chunks of all documents.
        tokenizer: tokenizer; worker processes import it if it is a plug-in's.
        dtype: dtype of the tokens.
        workers: number of processes, 0 for one per core; a small corpus is tokenized in this
            process. The concatenated blocks do not depend on it.
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
    encode = partial(encode_chunks, tokenizer, dtype)
    if workers == 1 or size <= _SMALL:
        yield from map(encode, groups)
    else:
        from lm.data.tokenizing_pool import encode_in_processes

        yield from encode_in_processes(groups, encode, workers)


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


def encode_chunks(tokenizer: Tokenizer, dtype: np.dtype, group: list[Chunk]) -> TokenBlock:
    """Tokenize a group of chunks, with special tokens at the ends of documents."""
    parts: list[np.ndarray] = []
    starts: list[int] = []
    n = n_bytes = n_characters = n_words = 0
    encoded = tokenizer.encode_batch([chunk.text for chunk in group])
    for chunk, ids in zip(group, encoded, strict=True):
        tokens = _with_special_tokens(tokenizer, chunk, ids)
        # Skip a document without tokens, such as spaces under a vocabulary that drops them.
        if chunk.first and (len(tokens) or not chunk.last):
            starts.append(n)
        parts.append(tokens.astype(dtype))
        n += len(tokens)
        n_bytes += len(chunk.text.encode())
        n_characters += len(chunk.text)
        n_words += len(chunk.text.split())
    borders = np.asarray(starts, np.int64)
    return TokenBlock(np.concatenate(parts), borders, n_bytes, n_characters, n_words)


def _with_special_tokens(tokenizer: Tokenizer, chunk: Chunk, tokens: np.ndarray) -> np.ndarray:
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    before = [bos] if chunk.first and bos is not None else []
    # If newlines are eos, a trailing newline has already ended the document.
    ended = len(tokens) > 0 and tokens[-1] == eos
    after = [eos] if chunk.last and eos is not None and eos != bos and not ended else []
    return np.concatenate([np.asarray(part, np.int32) for part in (before, tokens, after)])


# --- windows


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Sequence of windows that start every `stride` tokens.

    An example has three int32 arrays [length + 1]: "tokens", "segment_ids" (documents of the
    window, numbered from 1; 0 for padding) and "positions" (from the start of the document's part
    in the window). "weights", float32 [length], is 1 if the next token is a target: in the same
    document, or the delimiter that ends it and starts another.

    Attributes:
        store: token store.
        length: targets per window.
        stride: tokens between the starts of consecutive windows.
        isolate: make each document a segment; otherwise a window is a single segment.
        drop_remainder: drop an incomplete last window; otherwise pad it.
    """

    store: TokenStore
    length: int
    stride: int
    isolate: bool
    drop_remainder: bool

    def __len__(self) -> int:
        n_targets = len(self.store.tokens) - 1
        if self.drop_remainder:
            return max((n_targets - self.length) // self.stride + 1, 0)
        return max(-(-n_targets // self.stride), 0)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        size = self.length + 1
        start = index * self.stride
        found = self.store.tokens[start : start + size]
        if self.isolate:
            segment_ids, positions = self._documents(start, start + len(found))
        else:
            segment_ids, positions = (part[: len(found)] for part in self._one_segment)
        in_document = segment_ids[1:] == segment_ids[:-1]
        if self.store.manifest.delimiter is not None:
            in_document |= found[1:] == self.store.manifest.delimiter
        example = {
            "tokens": found.astype(np.int32),
            "segment_ids": segment_ids,
            "positions": positions,
            "weights": in_document.astype(np.float32),
        }
        if len(found) == size:
            return example
        padding = (0, size - len(found))
        return {name: np.pad(values, padding) for name, values in example.items()}

    @cached_property
    def _one_segment(self) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(self.length + 1, dtype=np.int32)
        positions.flags.writeable = False
        return np.broadcast_to(np.int32(1), positions.shape), positions

    def _documents(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return segment ids and positions of tokens [start, end) of the store."""
        offsets = self.store.offsets
        first = offsets.searchsorted(start, side="right")
        last = offsets.searchsorted(end, side="left")
        segment_ids, positions = (part[: end - start] for part in self._one_segment)
        if first == last:
            return segment_ids, positions
        borders = offsets[first:last] - start
        starts_document = np.zeros(end - start, np.int32)
        starts_document[borders] = 1
        own_start = np.zeros(end - start, np.int32)
        own_start[borders] = borders
        return (
            segment_ids + starts_document.cumsum(dtype=np.int32),
            positions - np.maximum.accumulate(own_start),
        )


def token_windows(
    store: TokenStore, length: int, stride: int, isolate: bool, drop_remainder: bool
) -> TokenWindows:
    """Return the windows of a store: only full ones for training (`drop_remainder`), or all.

    If stride = length, every token except the store's first one is a target exactly once.

    Args:
        store: token store.
        length: targets per window.
        stride: tokens between the starts of consecutive windows.
        isolate: make each document a segment; otherwise a window is a single segment.
        drop_remainder: drop an incomplete last window; otherwise pad it.

    Raises:
        UserError: the store has too few tokens for one window.
    """
    examples = TokenWindows(store, length, stride, isolate, drop_remainder)
    if not len(examples):
        raise UserError(
            f"{store.manifest.source} has {store.n_tokens} tokens, too few for one window of "
            f"{length} + 1: use more text or a smaller --config.data.sequence_length"
        )
    return examples
