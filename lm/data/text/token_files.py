"""Sources `nanogpt` and `megatron`: pretokenized files written by other programs.

`nanogpt` reads files from nanoGPT's prepare.py (ids only), and files with the header of llm.c and
modded-nanogpt; several files form one stream. `megatron` reads indexed data sets of Megatron-LM:
PREFIX.bin, and PREFIX.idx with the document boundaries. `data.tokenizer` names the tokenizer; ids
are copied into a store in the cache and checked against the vocabulary.
"""

from __future__ import annotations

import io
import json
import os
import struct
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lm.data.file_digests import file_state, hash_files, raw_file, require_unchanged
from lm.data.files import find_files
from lm.data.held_out import HeldOut
from lm.data.sources import Chunk, DocumentSource, cut_document
from lm.data.store import (
    TokenStore,
    delimiter,
    make_manifest,
    open_token_store,
    store_checksums,
    store_key,
    token_dtype,
)
from lm.data.tokenizer import Tokenizer, is_fitted, make_tokenizer
from lm.errors import UserError
from lm.progress import progress_bar
from lm.storage import cache_directory, open_or_build, write_durably

_BLOCK = 2**22  # tokens
_HEADER_BYTES = 1024
_HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}  # (magic, version) of llm.c
_INDEX_MAGIC = b"MMIDIDX\0\0"
_OLD_MAGIC = b"TNTIDX\0\0"
_INDEX_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


class TokenRun(NamedTuple):
    """Contiguous tokens of a file.

    Attributes:
        path: file.
        dtype: dtype of the tokens, little-endian.
        start: byte offset of the first token.
        n: number of tokens.
    """

    path: Path
    dtype: str
    start: int
    n: int


class FlaggedTokens(NamedTuple):
    """Tokens, and flags of those that start a document."""

    tokens: np.ndarray  # [n] int64
    begins: np.ndarray  # [n] bool


class TokenFiles(DocumentSource):
    """Files of token ids, which are used without tokenizing again."""

    kind: ClassVar[str]
    files: tuple[Path, ...]

    def __init__(self, argument: str, data: Any, split: str):
        self.name, self.data = f"{self.kind}:{argument}", data
        if is_fitted(data.tokenizer):
            raise UserError(
                f"{self.name} contains token ids: name the tokenizer that produced them, such as "
                f"--config.data.tokenizer=gpt2:FOLDER, instead of {data.tokenizer}"
            )
        self.files = self._find(argument)

    @abstractmethod
    def _find(self, argument: str) -> tuple[Path, ...]:
        """Find the files of an argument."""

    @abstractmethod
    def flagged(self, tokenizer: Tokenizer) -> Iterator[FlaggedTokens]:
        """Yield all tokens, checked, with document starts."""

    @cached_property
    def digest(self) -> str:
        return hash_files(self.files, self.kind, self.data.token_dtype, self.data.end_token)

    @property
    def size(self) -> int:  # type: ignore[override]
        return sum(file_state(path)[2] for path in self.files)

    def chunks(self) -> Iterator[Chunk]:
        """Yield the documents, decoded without special tokens at their ends."""
        tokenizer = make_tokenizer(self.data, ())
        special = {tokenizer.bos_id, tokenizer.eos_id}
        document: list[int] = []

        def decoded() -> Iterator[Chunk]:
            yield from cut_document([tokenizer.decode(i for i in document if i not in special)])

        for tokens, begins in self.flagged(tokenizer):
            first, *others = np.split(tokens, np.flatnonzero(begins))
            document += first.tolist()
            for other in others:
                yield from decoded()
                document = other.tolist()
        yield from decoded()

    def build_store(self, side: Any, tokenizer: Tokenizer, data: Any, progress: bool) -> TokenStore:
        """Open the store of the tokens; copy them first if they are not in the cache.

        Args:
            side: this source, or its training or validation side.
            tokenizer: tokenizer that produced the tokens.
            data: section `data` of the configuration.
            progress: show a progress bar on stderr.

        Raises:
            UserError: a file is damaged, or an id is beyond the vocabulary.
        """

        def write(folder: Path) -> None:
            name = f"copying {side.name}"
            bar = progress_bar(name, None, shown=progress, unit="token", unit_scale=True)
            with bar:
                sizes = _write(folder, self._side(side, tokenizer), tokenizer, bar.update)
            manifest = make_manifest(side, tokenizer, sizes, store_checksums(folder))
            content = json.dumps(asdict(manifest), indent=2).encode()
            write_durably(folder / "manifest.json", content)

        key = store_key(side.digest, tokenizer.digest)
        read = partial(open_token_store, source=side.name)
        return open_or_build(cache_directory(data) / "stores" / key, read, write)

    def _side(self, side: Any, tokenizer: Tokenizer) -> Iterator[FlaggedTokens]:
        """Yield the tokens of one side: some of the documents, or a range of the only one."""
        if not isinstance(side, HeldOut):
            yield from self.flagged(tokenizer)
            return
        n_tokens = n_documents = 0
        for tokens, begins in self.flagged(tokenizer):
            n_tokens, n_documents = n_tokens + len(tokens), n_documents + int(begins.sum())
        border = side.border(n_tokens, "tokens") if n_documents == 1 else 0
        chosen = np.zeros(n_documents, bool)
        if n_documents > 1:
            chosen[side.chosen(n_documents)] = True
        place, document = 0, -1
        for tokens, begins in self.flagged(tokenizer):
            places, documents = place + np.arange(len(tokens)), document + begins.cumsum()
            held_out = places >= border if n_documents == 1 else chosen[documents]
            kept = held_out == (side.split == "validation")
            begins[places == border] |= n_documents == 1
            yield FlaggedTokens(tokens[kept], begins[kept])
            place, document = place + len(tokens), document + int(begins.sum())


class NanogptFiles(TokenFiles):
    """Files of ids from nanoGPT, llm.c or modded-nanogpt; PATH may be a glob."""

    kind = "nanogpt"

    def _find(self, argument: str) -> tuple[Path, ...]:
        return find_files(argument, self.data)

    def flagged(self, tokenizer: Tokenizer) -> Iterator[FlaggedTokens]:
        end = _end_id(self.data.end_token, tokenizer)
        is_first, ended = True, True
        for path in self.files:
            for tokens in _read(self._tokens_in(path), tokenizer):
                begins = np.zeros(len(tokens), bool)
                if end is not None and end == tokenizer.bos_id:
                    begins = tokens == end
                    begins[0] |= is_first
                else:
                    begins[0], begins[1:] = ended, tokens[:-1] == end
                is_first, ended = False, bool(tokens[-1] == end)
                yield FlaggedTokens(tokens, begins)

    def _tokens_in(self, path: Path) -> TokenRun:
        """Return the tokens of a file, by its header or `data.token_dtype`."""
        with _reading(path) as file:
            header = file.read(_HEADER_BYTES)
        size, stated = file_state(path)[2], self.data.token_dtype
        magic, version, n = struct.unpack("<3i", header[:12].ljust(12, b"\0"))
        dtype = _HEADERS.get((magic, version))
        if dtype is None and magic in dict(_HEADERS.keys()):
            raise UserError(f"{path}: has an llm.c header of unknown version {version}")
        if dtype is None:
            if not stated:
                raise UserError(
                    f"{path}: has no header: set --config.data.token_dtype, "
                    "which is uint16 for nanoGPT's files"
                )
            item = np.dtype(stated).itemsize
            if size % item:
                raise UserError(f"{path}: its {size} bytes are not a multiple of {stated}")
            return TokenRun(path, stated, 0, size // item)
        if stated not in ("", dtype):
            raise UserError(f"{path}: holds {dtype}, not --config.data.token_dtype={stated}")
        if size != _HEADER_BYTES + n * np.dtype(dtype).itemsize:
            raise UserError(
                f"{path}: truncated or damaged: it has {size} bytes instead of those of {n} "
                f"{dtype} tokens"
            )
        return TokenRun(path, dtype, _HEADER_BYTES, n)


class MegatronFiles(TokenFiles):
    """Indexed data set of Megatron-LM, PREFIX.bin and PREFIX.idx; PREFIX may be a glob."""

    kind = "megatron"

    def _find(self, argument: str) -> tuple[Path, ...]:
        indices = find_files(f"{argument}.idx", self.data)
        tokens = (find_files(str(path.with_suffix(".bin")), self.data) for path in indices)
        return tuple(
            chain.from_iterable(
                (index, *of_it) for index, of_it in zip(indices, tokens, strict=True)
            )
        )

    def flagged(self, tokenizer: Tokenizer) -> Iterator[FlaggedTokens]:
        yield from _begin_with(delimiter(tokenizer), self._documents(tokenizer))

    def _documents(self, tokenizer: Tokenizer) -> Iterator[FlaggedTokens]:
        for index, path in zip(self.files[::2], self.files[1::2], strict=True):
            run, starts = _read_index(index, path)
            place = 0
            for tokens in _read(run, tokenizer):
                begins = np.zeros(len(tokens), bool)
                low, high = np.searchsorted(starts, [place, place + len(tokens)])
                begins[starts[low:high] - place] = True
                place += len(tokens)
                yield FlaggedTokens(tokens, begins)


def _begin_with(mark: int | None, blocks: Iterator[FlaggedTokens]) -> Iterator[FlaggedTokens]:
    """Shift document starts so that delimiters come first, as in our own stores."""
    held = FlaggedTokens(np.zeros(0, np.int64), np.zeros(0, bool))
    for block in blocks:
        tokens, begins = (np.concatenate(pair) for pair in zip(held, block, strict=True))
        if mark is not None:
            moved = begins[1:] & (tokens[:-1] == mark)
            begins[1:] &= ~moved
            begins[:-1] |= moved
        yield FlaggedTokens(tokens[:-1], begins[:-1])
        held = FlaggedTokens(tokens[-1:], begins[-1:])
    yield held


def _end_id(text: str, tokenizer: Tokenizer) -> int | None:
    """Return the id of `data.end_token`; None if documents are not separated."""
    if text == "none":
        return None
    if not text:
        if tokenizer.eos_id is None:
            raise UserError(
                "--config.data.end_token is empty and the tokenizer has no end-of-document token: "
                "set it to an id, or to none if the files are one document"
            )
        return tokenizer.eos_id
    found = int(text) if text.isascii() and text.isdigit() else tokenizer.token_id(text)
    if found is None or found >= tokenizer.vocab_size:
        raise UserError(f"--config.data.end_token={text}: the tokenizer has no such token")
    return found


@contextmanager
def _reading(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file, and convert read errors to UserError."""
    try:
        with raw_file(path) as file:
            yield file
        require_unchanged(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _read(run: TokenRun, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the tokens of a file as int64, checked against the vocabulary."""
    dtype = np.dtype(run.dtype).newbyteorder("<")
    place = 0
    with _reading(run.path) as file:
        file.seek(run.start)
        while place < run.n:
            content = file.read(min(_BLOCK, run.n - place) * dtype.itemsize)
            tokens = np.frombuffer(content, dtype, len(content) // dtype.itemsize).astype(np.int64)
            if not len(tokens):
                raise UserError(f"{run.path}: ends after {place} of {run.n} tokens")
            bad = np.flatnonzero((tokens < 0) | (tokens >= tokenizer.vocab_size))
            if len(bad):
                number = place + int(bad[0])
                raise UserError(
                    f"{run.path}: token {number} (byte {run.start + number * dtype.itemsize}) is "
                    f"{tokens[bad[0]]}, beyond the {tokenizer.vocab_size} ids of "
                    "--config.data.tokenizer: the file was written with a different "
                    "tokenizer or data.token_dtype"
                )
            place += len(tokens)
            yield tokens


def _read_index(path: Path, tokens: Path) -> tuple[TokenRun, np.ndarray]:
    """Read a Megatron-LM index.

    Args:
        path: PREFIX.idx.
        tokens: PREFIX.bin.

    Returns:
        The tokens, and the index of each document's first token, int64.

    Raises:
        UserError: the index is damaged, of an unsupported kind, or does not match the tokens.
    """
    with _reading(path) as file:
        content = file.read()
    if content.startswith(_OLD_MAGIC):
        raise UserError(f"{path}: an index in the old format (TNTIDX): create it again with mmap")
    head = struct.calcsize("<QBQ") + len(_INDEX_MAGIC)
    if not content.startswith(_INDEX_MAGIC) or len(content) < head:
        raise UserError(f"{path}: not an index of Megatron-LM (MMIDIDX), or truncated")
    version, code, n = struct.unpack_from("<QBQ", content, len(_INDEX_MAGIC))
    if version != 1 or code not in _INDEX_DTYPES:
        raise UserError(f"{path}: version {version} with type {code} of tokens is not known")
    has_documents = len(content) != head + 12 * n  # fairseq's index has none
    if has_documents and len(content) >= head + 8:
        (n_bounds,) = struct.unpack_from("<Q", content, head)
        head += 8
        size = head + 12 * n + 8 * n_bounds
        has_documents = len(content) in (size, size + n)  # with a mode per sequence if multimodal
        if not has_documents:
            raise UserError(f"{path}: truncated or damaged: {len(content)} bytes instead of {size}")
        bounds = np.frombuffer(content, "<i8", n_bounds, head + 12 * n)
    elif has_documents:
        raise UserError(f"{path}: truncated or damaged")
    else:
        bounds = np.arange(n + 1)
    lengths = np.frombuffer(content, "<i4", n, head).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", n, head + 4 * n)
    dtype = _INDEX_DTYPES[code]
    places = np.concatenate([[0], lengths.cumsum()])
    item = np.dtype(dtype).itemsize
    if (lengths < 0).any() or (pointers != places[:-1] * item).any():
        raise UserError(f"{path}: its sequences are not contiguous: merge them again")
    is_whole = (
        len(bounds) and bounds[0] == 0 and bounds[-1] == n and (bounds[1:] >= bounds[:-1]).all()
    )
    if not is_whole:
        raise UserError(f"{path}: damaged: its documents do not cover all its sequences")
    run = TokenRun(tokens, dtype, 0, int(places[-1]))
    size = file_state(tokens)[2]
    if size != run.n * item:
        raise UserError(f"{tokens}: has {size} bytes, but {path.name} is of {run.n * item}")
    starts = np.unique(places[bounds])
    return run, starts[starts < run.n]


def _write(
    folder: Path,
    blocks: Iterator[FlaggedTokens],
    tokenizer: Tokenizer,
    report: Callable[[int], object],
) -> np.ndarray:
    """Write the arrays of a store; return its sizes, with 0 for the unknown text sizes."""
    mark, dtype = delimiter(tokenizer), token_dtype(tokenizer)
    n, last, last_start = 0, -1, -1
    paths = folder / "tokens.bin", folder / "offsets.bin"
    with open(paths[0], "wb") as tokens_file, open(paths[1], "wb") as offsets_file:
        for tokens, begins in blocks:
            starts = n + np.flatnonzero(begins)
            tokens_file.write(tokens.astype(dtype).tobytes())
            offsets_file.write(starts.astype(np.int64).tobytes())
            n += len(tokens)
            last = int(tokens[-1]) if len(tokens) else last
            last_start = int(starts[-1]) if len(starts) else last_start
            report(len(tokens))
        if mark is not None and last == mark and n > 1:  # it ends the last document
            n -= 1
            offsets_file.seek(-8 * (last_start == n), os.SEEK_END)
            offsets_file.truncate()
        elif mark is not None:
            tokens_file.write(np.asarray([mark], dtype).tobytes())
        n_documents = offsets_file.tell() // 8
        offsets_file.write(np.int64(n).tobytes())
        for file in (tokens_file, offsets_file):
            file.flush()
            os.fsync(file.fileno())
    return np.asarray([n, n_documents, 0, 0, 0], np.int64)
