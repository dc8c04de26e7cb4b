"""Pool of processes that tokenize a large corpus."""

from __future__ import annotations

import multiprocessing
import pickle
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

import numpy as np

from lm.config.registries import SCHEMA, TOKENIZERS
from lm.config.run_file import import_plugins
from lm.data.sources import Chunk
from lm.data.store import TokenBlock, encode_chunks
from lm.data.tokenizers.tokenizer import Tokenizer
from lm.errors import UserError
from lm.parallel.hosts import end_with_parent


def encode_in_processes(
    groups: Iterator[list[Chunk]], tokenizer: Tokenizer, dtype: np.dtype, workers: int
) -> Iterator[TokenBlock]:
    """Yield the block of each group of chunks, in order.

    Args:
        groups: groups of chunks.
        tokenizer: tokenizer; that of a plug-in is imported by the worker processes too.
        dtype: dtype of the tokens.
        workers: processes.

    Raises:
        UserError: a process was killed.
    """
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
    return [p for p in SCHEMA.plugins() if TOKENIZERS.kind in p["registers"]]


_worker_state: tuple[Tokenizer, np.dtype]


def _start_worker(plugins: list[dict[str, Any]], tokenizer: bytes, dtype: np.dtype) -> None:
    global _worker_state
    end_with_parent()
    import_plugins(plugins, {})  # before unpickling, which looks the tokenizer's class up
    _worker_state = pickle.loads(tokenizer), dtype


def _encode_in_worker(group: list[Chunk]) -> TokenBlock:
    return encode_chunks(*_worker_state, group)
