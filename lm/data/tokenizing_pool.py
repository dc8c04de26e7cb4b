"""Pool of processes that encode a large corpus, of texts or of recordings."""

from __future__ import annotations

import multiprocessing
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from lm.config.registries import SCHEMA, TOKENIZERS
from lm.config.run_file import import_plugins
from lm.errors import UserError
from lm.parallel.worker_processes import end_with_parent, starting_workers_for

GroupT = TypeVar("GroupT")
BlockT = TypeVar("BlockT")


def encode_in_processes(
    groups: Iterator[GroupT], encode: Callable[[GroupT], BlockT], workers: int
) -> Iterator[BlockT]:
    """Yield the block of each group, in order.

    Args:
        groups: groups of chunks, or of records.
        encode: function of a group that can be pickled; worker processes import the plug-ins that
            register a tokenizer too.
        workers: processes.

    Raises:
        UserError: a process was killed.
    """
    # Spawned, because JAX has threads and a forked process may inherit a lock that one holds.
    spawn, plugins = multiprocessing.get_context("spawn"), _tokenizer_plugins()
    given = plugins, pickle.dumps(encode)
    start = partial(starting_workers_for, pickle.dumps(given))
    with start():
        pool = ProcessPoolExecutor(workers, spawn, _start_worker, given)
    waiting: deque[Future[BlockT]] = deque()

    def submit(n: int) -> None:
        for group in islice(groups, n):
            with start():
                waiting.append(pool.submit(_encode_in_worker, group))

    try:
        submit(2 * workers)
        while waiting:
            block = waiting.popleft().result()
            submit(1)
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


_encode: Callable[[Any], Any]


def _start_worker(plugins: list[dict[str, Any]], encode: bytes) -> None:
    global _encode
    end_with_parent()
    import_plugins(plugins, {})  # before unpickling, which looks the tokenizer's class up
    _encode = pickle.loads(encode)


def _encode_in_worker(group: Any) -> Any:
    return _encode(group)
