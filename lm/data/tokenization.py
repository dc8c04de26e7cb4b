"""Turning pieces of text into blocks of tokens: in order, by any number of processes."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from lm.data.text.corpus import CHUNK, Chunk
from lm.data.tokenizers.tokenizer import Tokenizer
from lm.errors import UserError

# Starting worker processes costs more than tokenising this much text.
_SMALL = 4 * CHUNK


@dataclass(frozen=True)
class Block:
    """Tokens of consecutive pieces, and where in them documents start."""

    tokens: np.ndarray  # [n] of the store's dtype
    starts: np.ndarray  # [documents], int64
    n_bytes: int  # of UTF-8 text
    n_characters: int
    n_words: int  # between white space


def tokenize(
    pieces: Iterable[Chunk], tokenizer: Tokenizer, dtype: np.dtype, workers: int
) -> Iterator[Block]:
    """Yields the blocks of all pieces in order; together they do not depend on `workers`.

    workers: number of processes, 0 for one a core. A small corpus needs none but this one.
    """
    workers = workers or os.cpu_count() or 1
    groups = _group(pieces)
    head, size = [], 0
    for group in groups:
        head.append(group)
        size += sum(len(piece.text) for piece in group)
        if size > _SMALL:
            break
    groups = chain(head, groups)
    if workers == 1 or size <= _SMALL:
        for group in groups:
            yield _encode(tokenizer, dtype, group)
    else:
        yield from _in_processes(groups, tokenizer, dtype, workers)


def _group(pieces: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Groups pieces to about 2**20 characters, enough to be worth sending to a worker."""
    group: list[Chunk] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if size >= CHUNK:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encode(tokenizer: Tokenizer, dtype: np.dtype, group: list[Chunk]) -> Block:
    parts: list[np.ndarray] = []
    starts: list[int] = []
    n = n_bytes = n_characters = n_words = 0
    for piece in group:
        tokens = _with_borders(tokenizer, piece)
        # A document that a vocabulary has no token for, such as mere spaces, is none.
        if piece.first and (len(tokens) or not piece.last):
            starts.append(n)
        parts.append(tokens.astype(dtype))
        n += len(tokens)
        n_bytes += len(piece.text.encode())
        n_characters += len(piece.text)
        n_words += len(piece.text.split())
    borders = np.asarray(starts, np.int64)
    return Block(np.concatenate(parts), borders, n_bytes, n_characters, n_words)


def _with_borders(tokenizer: Tokenizer, piece: Chunk) -> np.ndarray:
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    tokens = tokenizer.encode(piece.text)
    before = [bos] if piece.first and bos is not None else []
    # Where a newline is the eos, a last newline has ended the document already.
    ended = len(tokens) > 0 and tokens[-1] == eos
    after = [eos] if piece.last and eos is not None and eos != bos and not ended else []
    if not before and not after:
        return tokens
    return np.concatenate([np.asarray(part, np.int32) for part in (before, tokens, after)])


_worker_state: tuple[Tokenizer, np.dtype]


def _start_worker(tokenizer: Tokenizer, dtype: np.dtype) -> None:
    global _worker_state
    _worker_state = tokenizer, dtype


def _encode_in_worker(group: list[Chunk]) -> Block:
    return _encode(*_worker_state, group)


def _in_processes(
    groups: Iterator[list[Chunk]], tokenizer: Tokenizer, dtype: np.dtype, workers: int
) -> Iterator[Block]:
    # Spawned, not forked: JAX has threads, and a forked child may inherit a lock that one holds.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer, dtype)
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
            "a tokenising process was killed, perhaps for lack of memory: "
            "use fewer --config.data.workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
