"""Verification of whole stores: every block checksum and every token id."""

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
from lm.data.sharded_store import ShardedManifest, read_index, read_manifest, store_place
from lm.data.shared_folder import SharedFolder, open_shared_folder
from lm.data.store import BLOCK
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.storage import cache_directory, read_json

_NO_MANIFEST = "manifest.json is damaged, or of another version"
_BLOCKS_READ = 64  # blocks of a shard per read
_NO_STORES = {".partial", ".shards", ".counts"}  # suffixes of folders that are not stores


@dataclass(frozen=True)
class StoreReport:
    """Result of verifying a store.

    Attributes:
        source: name of its source; "" if the manifest is not readable.
        folder: folder of the store, or its URL.
        n_bytes: number of bytes read.
        problems: problems, one line each; () if the store is intact.
        damaged: file to remove so that it is rebuilt; "" for the folder.
    """

    source: str
    folder: Path | str
    n_bytes: int
    problems: tuple[str, ...]
    damaged: str = ""


def verify_stores(data: Any, columns: tuple[str, ...], of_config: bool) -> Iterator[StoreReport]:
    """Verify the stores of a configuration's sources, or the whole cache.

    Args:
        data: section `data` of the configuration.
        columns: record columns of the sources; () for documents.
        of_config: verify only stores of the configuration's sources; token ids are checked against
            its tokenizer for the stores that use it.

    Raises:
        UserError: a source cannot be opened.
    """
    cache = cache_directory(data)
    there = sorted([*cache.glob("stores/*"), *cache.glob("records/*")])
    folders = [path for path in there if path.is_dir() and path.suffix not in _NO_STORES]
    folders = [path for path in folders if path.name != "by_name"]
    if not of_config:
        yield from (verify_store(folder) for folder in folders)
        yield from _verify_remote(data, None, None)
        return
    digests = {source.digest for source in sources_of(data, columns)}
    tokenizer = open_tokenizer(data, columns)
    for folder in folders:
        manifest = _manifest(folder)
        if manifest.get("source_digest", None) in {*digests, None}:
            same = manifest.get("tokenizer_digest") == tokenizer.digest
            yield verify_store(folder, tokenizer.vocab_size if same else None)
    yield from _verify_remote(data, digests, tokenizer)


def sources_of(data: Any, columns: tuple[str, ...]) -> tuple[Any, ...]:
    """Open the sources of all splits of a configuration.

    Args:
        data: section `data` of the configuration.
        columns: record columns of the sources; () for documents.

    Raises:
        UserError: a source cannot be opened.
    """
    own = "validation" if columns else "test"
    return (
        *open_sources(listed(data.source), data, "train", columns),
        *open_validation(data, columns),
        *open_sources(listed(data.test_source), data, own, columns),
    )


def _verify_remote(
    data: Any, digests: set[str] | None, tokenizer: Tokenizer | None
) -> Iterator[StoreReport]:
    """Verify the stores in a bucket: all, or those of some sources."""
    place = store_place(data)
    if "://" not in place:
        return
    for mark in sorted(open_shared_folder(place, "by_name").sizes()):
        folder = open_shared_folder(place, mark.partition(".")[2])
        manifest = read_manifest(folder)
        if manifest is None:
            yield StoreReport("", folder.place, 0, (_NO_MANIFEST,))
        elif digests is None or manifest.source_digest in digests:
            vocab_size = None
            if tokenizer and manifest.tokenizer_digest == tokenizer.digest:
                vocab_size = tokenizer.vocab_size
            yield _verify_shards(place, manifest, vocab_size)


def verify_store(folder: Path, vocab_size: int | None = None) -> StoreReport:
    """Read and verify a whole store of tokens or records.

    Args:
        folder: folder of the store.
        vocab_size: number of token ids; None if unknown.
    """
    manifest = _manifest(folder)
    try:
        return _verify(folder, manifest, vocab_size)
    except (KeyError, TypeError, ValueError, AttributeError):
        return StoreReport("", folder, 0, (_NO_MANIFEST,))


def _verify(folder: Path, manifest: dict[str, Any], vocab_size: int | None) -> StoreReport:
    if "shards" in manifest:
        return _verify_shards(folder.parent, ShardedManifest(**manifest), vocab_size)
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


def _verify_shards(
    place: Path | str, manifest: ShardedManifest, vocab_size: int | None
) -> StoreReport:
    """Verify all shards of a store."""
    files = open_shared_folder(place, manifest.folder)
    there, n_bytes, damaged = files.sizes(), 0, ""
    problems: list[str] = []
    for name, size, *_ in manifest.shards:
        if there.get(name) == size:
            found = list(_shard_problems(files, name, size, vocab_size))
            n_bytes += size
        else:
            found = [f"{name} has {there.get(name, 0):,} bytes instead of {size:,}"]
        problems += found
        damaged = damaged or (name if found else "")
    folder = files.place if "://" in files.place else Path(files.place)
    return StoreReport(manifest.source, folder, n_bytes, tuple(problems), damaged)


def _shard_problems(
    files: SharedFolder, name: str, size: int, vocab_size: int | None
) -> Iterator[str]:
    """Yield the damaged blocks of a shard, and blocks with invalid ids."""
    try:
        index = read_index(files, name, size)
    except UserError as error:
        yield str(error)
        return
    content = b""
    for number, expected in enumerate(index.checksums.tolist()):
        start, stop = number * shards.BLOCK, (number + 1) * shards.BLOCK
        if not content:
            content = files.read(name, start, start + _BLOCKS_READ * shards.BLOCK)
        block, content = content[: shards.BLOCK], content[shards.BLOCK :]
        where = f"{name}: block {number} (bytes {start:,} to {stop:,})"
        if zlib.crc32(block) != expected:
            yield f"{where} does not match its checksum"
        if vocab_size is not None and number < index.n_token_blocks:
            yield from _id_problems(where, np.frombuffer(block, index.about["dtype"]), vocab_size)


def _id_problems(where: str, ids: np.ndarray, vocab_size: int) -> Iterator[str]:
    if beyond := int((ids >= vocab_size).sum()):
        yield (
            f"{where} has {beyond:,} token ids beyond the vocabulary of {vocab_size:,}, "
            f"such as {int(ids.max())}"
        )


def _manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a store; {} if it is not readable."""
    try:
        return read_json(folder / "manifest.json")
    except (OSError, UserError):
        return {}


def _file_problems(
    path: Path, checksums: list[int], dtype: str, vocab_size: int | None
) -> Iterator[str]:
    """Yield the damaged blocks of a file, and blocks with ids beyond the vocabulary."""
    n_blocks = -(-path.stat().st_size // BLOCK)
    if n_blocks != len(checksums):
        yield f"{path.name} has {n_blocks} blocks instead of {len(checksums)}"
    with open(path, "rb") as file:
        for number, expected in enumerate(checksums[:n_blocks]):
            content = file.read(BLOCK)
            start = number * BLOCK
            where = f"{path.name}: block {number} (bytes {start:,} to {start + len(content):,})"
            if zlib.crc32(content) != expected:
                yield f"{where} does not match its checksum"
            if vocab_size is None or len(content) % np.dtype(dtype).itemsize:
                continue
            yield from _id_problems(where, np.frombuffer(content, dtype), vocab_size)
