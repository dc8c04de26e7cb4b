"""Pool of processes that tokenize a large corpus."""

from __future__ import annotations

import multiprocessing
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TYPE_CHECKING, Any

from lm.config.registries import SCHEMA, TOKENIZERS
from lm.config.run_file import import_plugins
from lm.errors import UserError
from lm.parallel.hosts import end_with_parent

if TYPE_CHECKING:
    from lm.data.sources import Chunk
    from lm.data.store import TokenBlock


def encode_in_processes(
    groups: Iterator[list[Chunk]], encode: Callable[[list[Chunk]], TokenBlock], workers: int
) -> Iterator[TokenBlock]:
    """Yield the block of each group of chunks, in order.

    Args:
        groups: groups of chunks.
        encode: function of a group that can be pickled; worker processes import the plug-ins that
            register a tokenizer too.
        workers: processes.

    Raises:
        UserError: a process was killed.
    """
    # Spawned, because JAX has threads and a forked process may inherit a lock that one holds.
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        _start_worker,
        (_tokenizer_plugins(), pickle.dumps(encode)),
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


_encode: Callable[[list[Chunk]], TokenBlock]


def _start_worker(plugins: list[dict[str, Any]], encode: bytes) -> None:
    global _encode
    end_with_parent()
    import_plugins(plugins, {})  # before unpickling, which looks the tokenizer's class up
    _encode = pickle.loads(encode)


def _encode_in_worker(group: list[Chunk]) -> TokenBlock:
    return _encode(group)
