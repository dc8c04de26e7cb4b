"""The record store: the records of a task tokenised once, on disk, read by random access."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from lm.data.records.offsets import locate
from lm.data.records.record_sources import TEXT_ROLES, Fields, Records
from lm.data.store import map_array
from lm.data.tokenizers.tokenizer import Tokenizer
from lm.errors import UserError
from lm.storage import DamagedFolder, open_or_build, write_durably

_FORMAT = 1


@dataclass(frozen=True)
class RecordManifest:
    """What a record store was made of, and its sizes.

    n_tokens and n_bytes (of UTF-8 text) are by role; `first_skipped` says what was wrong with the
    first of the `n_skipped` bad rows.
    """

    format: int
    source: str
    source_digest: str
    tokenizer_digest: str
    dtype: str
    n_rows: int
    n_skipped: int
    first_skipped: str
    n_tokens: dict[str, int]
    n_bytes: dict[str, int]


@dataclass(frozen=True, eq=False)
class Record:
    """One record: `raw` as it was read, and the tokens of its texts by role, without bos and eos.

    tokens: int32 [n] each. starts, ends: int32 [n], the characters raw["context"][start:end] that
    each token of the context stands for; None without a context.
    """

    raw: Fields
    tokens: dict[str, np.ndarray]
    starts: np.ndarray | None
    ends: np.ndarray | None


@dataclass(frozen=True, eq=False)
class RecordStore:
    """The records of a source, memory-mapped: those whose places in it are `rows`, int64 [n]."""

    directory: Path
    manifest: RecordManifest
    arrays: dict[str, np.ndarray]  # by name of the file
    rows: np.ndarray

    def part(self, which: np.ndarray) -> RecordStore:
        """The store of some of its records."""
        return replace(self, rows=self.rows[which])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index = self.rows[index]
        roles = self.manifest.n_tokens
        tokens = {role: self._row(role, index).astype(np.int32) for role in roles}
        raw = json.loads(self._row("raw", index).tobytes())
        if "context" not in roles:
            return Record(raw, tokens, None, None)
        return Record(raw, tokens, self._row("starts", index), self._row("ends", index))

    @property
    def n_tokens(self) -> int:
        """Of all texts together."""
        return sum(int(self.lengths(role).sum()) for role in self.manifest.n_tokens)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def lengths(self, role: str) -> np.ndarray:
        """Number of tokens of each record's text of a role, int64 [n_rows]."""
        return np.diff(self.arrays[f"{role}.offsets"])[self.rows]

    def _row(self, name: str, index: int) -> np.ndarray:
        start, end = self.arrays[f"{name}.offsets"][index : index + 2]
        return self.arrays[name][start:end]


def build_record_store(
    records: Records, tokenizer: Tokenizer, cache_directory: str | Path, progress: bool = False
) -> RecordStore:
    """Opens the store of records under a tokenizer, tokenising them first if it is not there.

    The progress bar and the number of rows skipped go to stderr. UserError for rows that are bad
    or cannot be encoded, and for a full disk.
    """
    recipe = json.dumps([_FORMAT, tokenizer.digest, records.digest])
    key = hashlib.sha256(recipe.encode()).hexdigest()[:32]
    store = open_or_build(
        Path(cache_directory) / "records" / key,
        _open,
        lambda folder: _write(folder, records, tokenizer, progress),
    )
    if skipped := store.manifest.n_skipped:
        of = skipped + len(store)
        first = store.manifest.first_skipped
        print(f"{records.name}: skipped {skipped} of {of} rows; first: {first}", file=sys.stderr)
    return store


def _write(folder: Path, records: Records, tokenizer: Tokenizer, progress: bool) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    encode = lru_cache(2**16)(tokenizer.encode)  # contexts repeat, and so do their words
    locate_again = lru_cache(16)(lambda text: locate(text, encode))
    n_bytes: Counter[str] = Counter()
    skipped: list[str] = []
    rows = records.read(skipped.append)
    writers = _Writers(folder)
    for record, where in tqdm(rows, f"tokenising {records.name}", disable=not progress):
        for role in (role for role in TEXT_ROLES if role in record):
            try:
                if role == "context":
                    tokens, starts, ends = locate_again(record[role])
                    writers.append("starts", starts)
                    writers.append("ends", ends)
                else:
                    tokens = tokenizer.encode(record[role])
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            writers.append(role, tokens.astype(dtype))
            n_bytes[role] += len(record[role].encode())
        writers.append("raw", np.frombuffer(json.dumps(record).encode(), np.uint8))
    writers.close()
    n_tokens = {role: writers.size(role) for role in n_bytes}
    for role in (role for role, size in n_tokens.items() if not size):
        raise UserError(f"{records.name}: the vocabulary has no token for any {role}")
    manifest = RecordManifest(
        format=_FORMAT,
        source=records.name,
        source_digest=records.digest,
        tokenizer_digest=tokenizer.digest,
        dtype=dtype.name,
        n_rows=len(writers.lengths["raw"]),
        n_skipped=len(skipped),
        first_skipped=skipped[0] if skipped else "",
        n_tokens=n_tokens,
        n_bytes=dict(n_bytes),
    )
    write_durably(folder / "manifest.json", json.dumps(asdict(manifest), indent=2).encode())


class _Writers:
    """Ragged arrays being written: NAME.bin holds the rows, NAME.offsets.bin where they start."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self.lengths: dict[str, list[int]] = {}

    def append(self, name: str, row: np.ndarray) -> None:
        if name not in self._files:
            self._files[name] = open(self._folder / f"{name}.bin", "wb")  # noqa: SIM115
            self.lengths[name] = []
        self._files[name].write(row.tobytes())
        self.lengths[name].append(len(row))

    def size(self, name: str) -> int:
        return sum(self.lengths[name])

    def close(self) -> None:
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            offsets = np.cumsum([0, *self.lengths[name]], dtype=np.int64)
            write_durably(self._folder / f"{name}.offsets.bin", offsets.tobytes())


def _open(folder: Path) -> RecordStore:
    try:
        manifest = RecordManifest(**json.loads((folder / "manifest.json").read_bytes()))
        dtypes = dict.fromkeys(manifest.n_tokens, manifest.dtype) | {"raw": "uint8"}
        if "context" in dtypes:
            dtypes |= {"starts": "int32", "ends": "int32"}
        arrays = {}
        for name, dtype in dtypes.items():
            offsets = map_array(folder / f"{name}.offsets.bin", "int64", manifest.n_rows + 1)
            arrays[f"{name}.offsets"] = offsets
            arrays[name] = map_array(folder / f"{name}.bin", dtype, int(offsets[-1]))
    except (OSError, ValueError, TypeError) as error:
        raise DamagedFolder(f"{type(error).__name__}: {error}") from error
    return RecordStore(folder, manifest, arrays, np.arange(manifest.n_rows))
