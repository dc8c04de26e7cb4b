"""Batches as a pure function of seed, step and data, placed on the devices that need them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import takewhile
from queue import SimpleQueue
from threading import Event
from typing import Any, Protocol, TypeVar

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm.errors import UserError

Example = Mapping[str, Any]
Arrays = dict[str, np.ndarray]
MakeFeatures = Callable[[Any, np.random.Generator], Arrays]
ExampleT_co = TypeVar("ExampleT_co", covariant=True)


class Examples(Protocol[ExampleT_co]):
    """Random access to the examples of a store."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ExampleT_co: ...


_LONGEST_SHUFFLE = 2**32  # Grain permutes 32-bit indices


def shuffle_endlessly(part: Examples, seed: int, index: int = 0) -> grain.MapDataset:
    """Return the endless examples of a part, reshuffled every epoch.

    Args:
        part: examples of a source.
        seed: seed of the order.
        index: index of the source; each source has its own order.

    Raises:
        UserError: the part is too long to shuffle.
    """
    if len(part) > _LONGEST_SHUFFLE:
        raise UserError(
            f"a source has {len(part)} windows, more than 2**32: use a larger --config.data.stride"
        )
    (part_seed,) = np.random.SeedSequence((seed, index)).generate_state(1)
    return ExampleSource(part).shuffle(seed=int(part_seed)).repeat()


def all_in_order(parts: Sequence[Examples]) -> grain.MapDataset:
    """Concatenate the examples of all parts, each once."""
    return grain.MapDataset.concatenate([ExampleSource(part) for part in parts])


class ExampleSource(grain.MapDataset):
    """Start of a Grain pipeline.

    Like grain.MapDataset.source, but without its monitoring, which takes longer than reading a
    window.
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
    """Batches of examples.

    Attributes:
        examples: examples in order.
        features: function from an example to arrays of fixed shape; its random generator depends
            only on `seed` and the index of the example in the order.
        batch_size: global batch size.
        seed: seed of the random generators.
        first_row: index of the first row of batch 0 in the order; may be negative if earlier
            batches of the run were smaller, in which case step 0 is never requested.
    """

    examples: grain.MapDataset
    features: MakeFeatures
    batch_size: int
    seed: int
    first_row: int = 0

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def at(self, step: int) -> Batches:
        """Return the batches with the size of a step's batch."""
        return self

    def rows(self, step: int, rows: Sequence[int] | np.ndarray) -> Arrays:
        """Return rows of a step's batch; a pure function of its arguments.

        Args:
            step: index of the batch.
            rows: indices of the rows.

        Returns:
            Arrays [len(rows), …] by name; rows beyond the last example are zeros.
        """
        start = self.first_row + step * self.batch_size
        found = [self._row(start + int(row)) for row in rows]
        return {name: np.stack([row[name] for row in found]) for name in found[0]}

    def _row(self, index: int) -> Mapping[str, np.ndarray]:
        if index >= len(self.examples):
            return self._empty_row
        # Counter-based generator whose key gives each row an independent stream.
        generator = np.random.Generator(np.random.Philox(key=(self.seed << 64) + index))
        return self.features(self.examples[index], generator)

    @cached_property
    def _empty_row(self) -> Arrays:
        return {name: np.zeros_like(values) for name, values in self._row(0).items()}


@lru_cache
def addressable_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Return the sorted rows of [steps, B] arrays that this process's devices hold."""
    held = np.zeros(batch_size, bool)
    indices: Any = sharding.addressable_devices_indices_map((1, batch_size)).values()
    for _, part in indices:
        held[part] = True
    return np.flatnonzero(held)


def to_device(
    batches: Batches, steps: Sequence[int], shardings: Mapping[str, NamedSharding]
) -> dict[str, jax.Array]:
    """Place the batches of some steps on the devices; each process builds only its own rows.

    Args:
        batches: batches of all steps.
        steps: steps to build; their batches must have the same size.
        shardings: shardings of the arrays by name, all with the same sharding of rows.

    Returns:
        Global arrays [steps, B, …] by name.
    """
    batches, one = batches.at(steps[0]), next(iter(shardings.values()))
    by_rows = NamedSharding(one.mesh, PartitionSpec(*one.spec[:2]))
    rows = addressable_rows(by_rows, batches.batch_size)
    parts = [batches.rows(step, rows) for step in steps]

    def place(local: np.ndarray, sharding: NamedSharding) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            wanted = range(batches.batch_size)[index[1]]
            start, stop = np.searchsorted(rows, [wanted.start, wanted.stop])
            return local[:, start:stop, *index[2:]]

        shape = (len(parts), batches.batch_size, *local.shape[2:])
        return jax.make_array_from_callback(shape, sharding, part)

    arrays = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    with jax.transfer_guard("allow"):  # the only intended transfer
        return {name: place(array, shardings[name]) for name, array in arrays.items()}


def prefetch(
    batches: Batches,
    dispatches: Iterable[Sequence[int]],
    shardings: Mapping[str, NamedSharding],
    depth: int = 2,
) -> Generator[dict[str, jax.Array], None, None]:
    """Yield `to_device` of each range of steps, prepared ahead in a thread.

    Errors of the thread are raised here; closing the generator stops the thread, which otherwise
    keeps the process alive: close it if a step may fail (`contextlib.closing`).

    Args:
        batches: batches of all steps.
        dispatches: sequences of steps.
        shardings: see `to_device`.
        depth: number of sequences prepared ahead.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="lm-batches")
    ready: SimpleQueue[Any] = SimpleQueue()  # batches, and finally the thread's future
    wanted, ended = Event(), Event()

    def prepare() -> None:
        for steps in takewhile(lambda _: not ended.is_set(), dispatches):
            ready.put(to_device(batches, steps, shardings))
            # Poll: waking a waiting thread may preempt this one.
            while ready.qsize() >= depth and not ended.is_set():
                wanted.wait(0.005)
                wanted.clear()

    thread.submit(prepare).add_done_callback(ready.put)
    try:
        while not isinstance(result := ready.get(), Future):
            if ready.empty():
                wanted.set()
            yield result
        result.result()  # raises its error
    finally:
        ended.set()
        thread.shutdown()
