"""Verification of whole stores: every block against its checksum, every token id."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.config.registry import listed
from lm.data import shards
from lm.data.dataset import open_sources, open_tokenizer, open_validation
from lm.data.sharded_store import ShardedManifest, read_index
from lm.data.shared_folder import SharedFolder, open_shared_folder
from lm.data.store import BLOCK
from lm.errors import UserError
from lm.storage import cache_directory, read_json

_NO_STORES = {".partial", ".shards", ".counts"}  # endings of folders


@dataclass(frozen=True)
class StoreReport:
    """Findings in a store.

    Attributes:
        source: name of its source; "" if the manifest cannot be read.
        folder: folder of the store.
        n_bytes: bytes that were read.
        problems: what is wrong, a line each; () if the store is as it was written.
    """

    source: str
    folder: Path
    n_bytes: int
    problems: tuple[str, ...]


def verify_stores(data: Any, records: bool, of_config: bool) -> Iterator[StoreReport]:
    """Verify the stores of the sources of a configuration, or all of its cache.

    Args:
        data: section `data` of the configuration.
        records: its sources hold records.
        of_config: verify the stores of the configuration's sources only, and their token ids
            against its tokenizer where they are of that.

    Raises:
        UserError: a source cannot be opened.
    """
    cache = cache_directory(data)
    there = sorted([*cache.glob("stores/*"), *cache.glob("records/*")])
    folders = [path for path in there if path.is_dir() and path.suffix not in _NO_STORES]
    folders = [path for path in folders if path.name != "by_name"]
    if not of_config:
        yield from (verify_store(folder) for folder in folders)
        return
    sources = open_sources(listed(data.source), data, "train", records)
    sources += open_validation(data, records)
    own = "validation" if records else "test"
    sources += open_sources(listed(data.test_source), data, own, records)
    digests = {source.digest for source in sources}
    tokenizer = open_tokenizer(data, records)
    for folder in folders:
        manifest = _manifest(folder)
        if manifest.get("source_digest", None) in {*digests, None}:
            same = manifest.get("tokenizer_digest") == tokenizer.digest
            yield verify_store(folder, tokenizer.vocab_size if same else None)


def verify_store(folder: Path, vocab_size: int | None = None) -> StoreReport:
    """Read a store of tokens or of records as a whole.

    Args:
        folder: folder of the store.
        vocab_size: number of token ids; None if it is not known.
    """
    manifest = _manifest(folder)
    try:
        return _verify(folder, manifest, vocab_size)
    except (KeyError, TypeError, ValueError, AttributeError):
        return StoreReport("", folder, 0, ("manifest.json is damaged, or of another version",))


def _verify(folder: Path, manifest: dict[str, Any], vocab_size: int | None) -> StoreReport:
    if "shards" in manifest:
        return _verify_shards(folder, ShardedManifest(**manifest), vocab_size)
    checksums, columns = manifest["checksums"], manifest["n_tokens"]
    tokens = [f"{name}.bin" for name in (columns if isinstance(columns, dict) else ["tokens"])]
    problems: list[str] = []
    n_bytes = 0
    for name in sorted({*checksums, *(path.name for path in folder.glob("*.bin"))}):
        if name not in checksums or not (folder / name).is_file():
            problems.append(f"{name} is missing" if name in checksums else f"{name} was added")
            continue
        size = vocab_size if name in tokens else None
        problems += _file_problems(folder / name, checksums[name], manifest["dtype"], size)
        n_bytes += (folder / name).stat().st_size
    return StoreReport(manifest["source"], folder, n_bytes, tuple(problems))


def _verify_shards(folder: Path, manifest: ShardedManifest, vocab_size: int | None) -> StoreReport:
    """Read all shards of a store."""
    files = open_shared_folder(folder.parent, manifest.folder)
    there, n_bytes = files.sizes(), 0
    problems: list[str] = []
    for name, size, *_ in manifest.shards:
        if there.get(name) != size:
            problems.append(f"{name} has {there.get(name, 0)} bytes instead of {size}")
            continue
        problems += _shard_problems(files, name, size, vocab_size)
        n_bytes += size
    return StoreReport(manifest.source, Path(files.place), n_bytes, tuple(problems))


def _shard_problems(
    files: SharedFolder, name: str, size: int, vocab_size: int | None
) -> Iterator[str]:
    """Yield the blocks of a shard that are not as they were written, or have wrong ids."""
    try:
        index = read_index(files, name, size)
    except UserError as error:
        yield str(error)
        return
    dtype = index.about["dtype"]
    for number, expected in enumerate(index.checksums.tolist()):
        start = number * shards.BLOCK
        content = files.read(name, start, start + shards.BLOCK)
        where = f"{name}: block {number} (bytes {start:,} to {start + len(content):,})"
        if zlib.crc32(content) != expected:
            yield f"{where} is not as it was written"
        if vocab_size is None or number >= index.n_token_blocks:
            continue
        yield from _id_problems(where, np.frombuffer(content, dtype), vocab_size)


def _id_problems(where: str, ids: np.ndarray, vocab_size: int) -> Iterator[str]:
    if beyond := int((ids >= vocab_size).sum()):
        yield (
            f"{where} has {beyond:,} token ids beyond the vocabulary of {vocab_size:,}, "
            f"such as {int(ids.max())}"
        )


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a store; {} if it cannot be read."""
    try:
        return read_json(folder / "manifest.json")
    except (OSError, UserError):
        return {}


def _file_problems(
    path: Path, checksums: list[int], dtype: str, vocab_size: int | None
) -> Iterator[str]:
    """Yield the blocks that are not as they were written, or have ids beyond the vocabulary."""
    n_blocks = -(-path.stat().st_size // BLOCK)
    if n_blocks != len(checksums):
        yield f"{path.name} has {n_blocks} blocks instead of {len(checksums)}"
    with open(path, "rb") as file:
        for number, expected in enumerate(checksums[:n_blocks]):
            content = file.read(BLOCK)
            start = number * BLOCK
            where = f"{path.name}: block {number} (bytes {start:,} to {start + len(content):,})"
            if zlib.crc32(content) != expected:
                yield f"{where} is not as it was written"
            if vocab_size is None or len(content) % np.dtype(dtype).itemsize:
                continue
            yield from _id_problems(where, np.frombuffer(content, dtype), vocab_size)
