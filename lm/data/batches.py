"""Batches as a pure function of seed, step and data, placed on the devices that need them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm.data.contiguous import Contiguous
from lm.errors import UserError

Example = Mapping[str, Any]
Examples = Sequence[Example]  # of which only the length and single items are asked
Arrays = dict[str, np.ndarray]
Features = Callable[[Example, np.random.Generator], Mapping[str, np.ndarray]]

_LONGEST_SHUFFLE = 2**32  # Grain permutes 32-bit indices


def shuffled(parts: Sequence[Examples], shares: Sequence[float], seed: int) -> grain.MapDataset:
    """Endless examples, each part shuffled anew every epoch, mixed by `shares`, one a part.

    Grain keeps the shares to about 1 %. UserError if a part is too long to shuffle.
    """
    streams = []
    for index, part in enumerate(parts):
        if len(part) > _LONGEST_SHUFFLE:
            raise UserError(
                f"a source has {len(part)} windows, more than 2**32: "
                "use a larger --config.data.stride"
            )
        (part_seed,) = np.random.SeedSequence((seed, index)).generate_state(1)
        streams.append(_Source(part).shuffle(seed=int(part_seed)).repeat())
    if len(streams) == 1:
        return streams[0]
    return grain.MapDataset.mix(streams, [float(share) for share in shares])


def contiguous(parts: Sequence[Examples], batch_size: int, endless: bool) -> grain.MapDataset:
    """Examples such that row r of a batch goes on where row r of the batch before ended."""
    (part,) = parts
    reordered: Any = Contiguous(part, batch_size, drop_remainder=endless)
    examples = _Source(reordered)
    return examples.repeat() if endless else examples


def in_order(parts: Sequence[Examples]) -> grain.MapDataset:
    """All examples of all parts, once."""
    return grain.MapDataset.concatenate([_Source(part) for part in parts])


class _Source(grain.MapDataset):
    """Examples as the start of a Grain pipeline.

    grain.MapDataset.source would do, but its monitoring takes longer than reading a window.
    """

    def __init__(self, parent: Examples):
        super().__init__()
        self._examples = parent

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        return self._examples[index % len(self._examples)]


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of `batch_size` examples, in the order of `examples`.

    features: turns an example into arrays of fixed shape; its generator depends only on `seed`
    and on the example's place in the order.
    """

    examples: grain.MapDataset
    features: Features
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def rows(self, step: int, rows: Sequence[int] | np.ndarray) -> Arrays:
        """Rows of the batch of a step: arrays [len(rows), ...], a pure function of its arguments.

        Rows beyond the last example are zeros.
        """
        indices = [step * self.batch_size + int(row) for row in rows]
        found = [self._row(index) for index in indices]
        return {name: np.stack([row[name] for row in found]) for name in found[0]}

    def _row(self, index: int) -> Mapping[str, np.ndarray]:
        if index >= len(self.examples):
            return self._empty_row
        # A counter-based generator: its key alone gives the row a stream of its own.
        generator = np.random.Generator(np.random.Philox(key=(self.seed << 64) + index))
        return self.features(self.examples[index], generator)

    @cached_property
    def _empty_row(self) -> Arrays:
        return {name: np.zeros_like(values) for name, values in self._row(0).items()}


@lru_cache
def host_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of [steps, batch] arrays that this process's devices hold: sorted, each once."""
    held = np.zeros(batch_size, bool)
    indices: Any = sharding.addressable_devices_indices_map((1, batch_size)).values()
    for _, part in indices:
        held[part] = True
    return np.flatnonzero(held)


def to_device(
    batches: Batches, steps: Sequence[int], shardings: Mapping[str, NamedSharding]
) -> dict[str, jax.Array]:
    """The batches of some steps as global arrays [steps, batch, ...].

    `shardings` are those of the arrays by name, all alike in their rows; each process builds only
    its own rows.
    """
    one = next(iter(shardings.values()))
    by_rows = NamedSharding(one.mesh, PartitionSpec(*one.spec[:2]))
    rows = host_rows(by_rows, batches.batch_size)
    parts = [batches.rows(step, rows) for step in steps]

    def place(local: np.ndarray, sharding: NamedSharding) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            wanted = range(batches.batch_size)[index[1]]
            start, stop = np.searchsorted(rows, [wanted.start, wanted.stop])
            return local[:, start:stop, *index[2:]]

        shape = (len(parts), batches.batch_size, *local.shape[2:])
        return jax.make_array_from_callback(shape, sharding, part)

    arrays = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    with jax.transfer_guard("allow"):  # the one transfer that is meant
        return {name: place(array, shardings[name]) for name, array in arrays.items()}


def prefetch(
    batches: Batches,
    dispatches: Iterable[Sequence[int]],
    shardings: Mapping[str, NamedSharding],
    depth: int = 2,
) -> Generator[dict[str, jax.Array], None, None]:
    """`to_device` of each sequence of steps; a thread prepares `depth` of them ahead.

    Errors of the thread are raised here; closing the generator stops the thread.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="lm-batches")
    waiting = iter(dispatches)
    pending: deque[Future] = deque()

    def submit(n: int) -> None:
        for steps in islice(waiting, n):
            pending.append(thread.submit(to_device, batches, steps, shardings))

    try:
        submit(depth)
        while pending:
            result = pending.popleft().result()
            submit(1)
            yield result
    finally:
        thread.shutdown(cancel_futures=True)
