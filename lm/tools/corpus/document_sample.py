"""Random samples that depend only on documents and seed, not on how tasks read them."""

from __future__ import annotations

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import SamplerFilter
from datatrove.utils.hashes.sha1 import sha1_hash64

_LIMIT = "limit"  # file with the largest sampled key


def sample_key(document: Document, seed: int) -> int:
    """Return a number below 2**64 that orders documents randomly."""
    return sha1_hash64(f"{seed}\0{document.id}\0{document.text}")


class SampleKeys(PipelineStep):
    """Compute the document keys, for a sample of a given size."""

    type, name = "🎲", "keys"

    def __init__(self, folder: str, seed: int):
        super().__init__()
        self.folder, self.seed = get_datafolder(folder), seed

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        keys = np.array([sample_key(document, self.seed) for document in data], np.uint64)
        with self.folder.open(f"{rank:05d}.keys", "wb") as file:
            file.write(keys.tobytes())
        yield from ()


class SampleLimit(PipelineStep):
    """Compute the largest key of a sample of a given size."""

    type, name = "🎲", "limit"

    def __init__(self, folder: str, documents: int):
        super().__init__()
        self.folder, self.documents = get_datafolder(folder), documents

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        smallest = np.empty(0, np.uint64)
        for name in self.folder.list_files(glob_pattern="*.keys"):
            with self.folder.open(name, "rb") as file:
                smallest = np.concatenate([smallest, np.frombuffer(file.read(), np.uint64)])
            smallest = np.sort(smallest)[: self.documents]
        with self.folder.open(_LIMIT, "w") as file:
            file.write(str(int(smallest.max(initial=0))))
        yield from ()


class Sample(SamplerFilter):
    """Keep a fraction of the documents, or those up to a limit."""

    def __init__(self, fraction: float, seed: int, folder: str = ""):
        super().__init__(fraction)
        self.seed, self.folder, self._limit = seed, folder, int(fraction * 2**64) - 1

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if self.folder:
            with get_datafolder(self.folder).open(_LIMIT, "r") as file:
                self._limit = int(file.read())
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool:
        return sample_key(doc, self.seed) <= self._limit
