"""Sharded token stores, for large corpora and for caches in a bucket.

The parts of a source are grouped into shards of about 256 MiB (less for small corpora), which any
number of processes build together (`shared_build`) in a folder named by the names, sizes and times
of the files. Contents are hashed while they are read; once all shards exist, the manifest is
written under the key of the contents, where the next start finds it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm.config.registries import SCHEMA, SOURCES, TOKENIZERS
from lm.data import file_digests
from lm.data.file_digests import file_digest, file_state, remember_digest, require_unchanged
from lm.data.file_parts import piece_size
from lm.data.held_out import HeldOut
from lm.data.shard_cache import shard_files
from lm.data.shards import (
    INDEX_READ,
    DamagedShard,
    ShardedOffsets,
    ShardedTokens,
    ShardIndex,
    ShardReader,
    ShardWriter,
    parse_index,
)
from lm.data.shared_build import Report, build_together
from lm.data.shared_folder import SharedFolder, open_shared_folder
from lm.data.sources import Chunk, Corpus, DocumentSource, Part
from lm.data.store import (
    Manifest,
    TokenStore,
    build_token_store,
    make_manifest,
    store_key,
    token_dtype,
    tokenize_chunks,
)
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.storage import cache_directory, chosen_cache, parse_json, read_json

SHARD = 2**28  # approximate source bytes per shard of a large source
_VERSION = 1


@dataclass(frozen=True)
class ShardedManifest(Manifest):
    """Origin and sizes of a sharded store.

    Attributes:
        folder: name of the shard folder, next to that of the manifest.
        shards: name, bytes, tokens and documents of each shard.
    """

    folder: str
    shards: list[tuple[str, int, int, int]]


def open_sharded_store(
    corpus: Corpus, tokenizer: Tokenizer, data: Any, progress: bool
) -> TokenStore:
    """Open the sharded store of a corpus; build missing shards together with other processes.

    Args:
        corpus: documents.
        tokenizer: tokenizer of the documents.
        data: section `data` of the configuration.
        progress: show a progress bar on stderr.

    Raises:
        UserError: text cannot be read or encoded, or the cache is not usable.
    """
    build = _Build(corpus, tokenizer, data, progress)
    return build.find() or build.make()


def store_place(data: Any) -> str:
    """Return the folder or URL of the token stores."""
    chosen = chosen_cache(data)
    return f"{chosen.rstrip('/') if '://' in chosen else cache_directory(data)}/stores"


def read_manifest(folder: SharedFolder) -> ShardedManifest | None:
    """Read the manifest of a sharded store; None if it is missing or does not match."""
    try:
        content = parse_json(folder.read("manifest.json"), f"{folder.place}/manifest.json")
        return ShardedManifest(**content) if "shards" in content else None
    except (FileNotFoundError, NotADirectoryError, TypeError, UserError):
        return None


@dataclass
class _Build:
    """Lookup or build of a corpus's store."""

    corpus: Corpus
    tokenizer: Tokenizer
    data: Any
    progress: bool

    def __post_init__(self) -> None:
        self.place = store_place(self.data)
        self.workers = self.data.workers
        self.dtype = token_dtype(self.tokenizer)
        # Stores of the same source and tokenizer: only if there are any, hashing is worthwhile.
        named = _hash(self.corpus.name, self.tokenizer.digest)
        self.by_name, self.mark = open_shared_folder(self.place, "by_name"), f"{named}."

    # --- lookup

    def find(self) -> TokenStore | None:
        """Return the store if it exists."""
        try:
            with file_digests.hashing("known"):
                digest = self.corpus.digest
        except file_digests.UnknownDigestError:
            if not self._may_exist():
                return None
            digest = self.corpus.digest
        key = store_key(digest, self.tokenizer.digest)
        if self._is_of_one_piece(key):
            cache = Path(self.place).parent
            return build_token_store(
                self.corpus, self.tokenizer, cache, self.workers, self.progress
            )
        manifest = read_manifest(open_shared_folder(self.place, key))
        return self._open(manifest) if manifest and self._is_whole(manifest) else None

    def _may_exist(self) -> bool:
        if any(name.startswith(self.mark) for name in self.by_name.sizes()):
            return True
        files = Path(self.place).glob("*/manifest.json") if "://" not in self.place else ()
        for file in files:
            with suppress(OSError, UserError):  # damaged, and of another source
                about = read_json(file)
                if about.get("source") == self.corpus.name and "shards" not in about:
                    return True
        return False

    def _is_of_one_piece(self, key: str) -> bool:
        """Return whether `build_token_store` has built an unsharded store."""
        return "://" not in self.place and Path(self.place, key, "tokens.bin").exists()

    def _is_whole(self, manifest: ShardedManifest) -> bool:
        """Return whether all shards exist; remove those of wrong size."""
        folder = open_shared_folder(self.place, manifest.folder)
        there = folder.sizes()
        bad = [name for name, size, *_ in manifest.shards if there.get(name) != size]
        for name in bad:
            folder.remove(name)
        if bad:
            line = f"{folder.place}: {len(bad)} shards are missing or damaged: building them again"
            print(line, file=sys.stderr)
        return not bad

    def _open(self, manifest: ShardedManifest) -> TokenStore:
        folder = open_shared_folder(self.place, manifest.folder)
        sizes = {name: size for name, size, *_ in manifest.shards}
        files = shard_files(folder, self.data)
        reader = ShardReader(folder.place, sizes, self.dtype, files)
        lengths = [n_tokens for _, _, n_tokens, _ in manifest.shards]
        tokens: Any = ShardedTokens(reader, lengths, self.dtype, manifest.delimiter)
        documents = [n_documents for *_, n_documents in manifest.shards]
        offsets: Any = ShardedOffsets(reader, documents, tokens.starts)
        directory: Any = folder.place if "://" in folder.place else Path(folder.place)
        manifest = replace(manifest, source=self.corpus.name)
        return TokenStore(directory, manifest, tokens, offsets)

    # --- build

    def make(self) -> TokenStore:
        """Build the store, together with other processes that do the same."""
        parts: Sequence[Part] = self._parts()
        identity = _identity(self.corpus)
        name = _hash(self.tokenizer.digest, identity, _plan(parts)) + ".shards"
        folder = open_shared_folder(self.place, name)
        groups = _group(parts)
        workers = self.workers if len(groups) == 1 else 1
        shards = [
            ShardTask(f"{i:05d}.shard", group, self.tokenizer, self.dtype, workers)
            for i, group in enumerate(groups)
        ]
        indices: list[ShardIndex] = []

        def digests() -> list[list[str]]:
            indices[:] = _read_indices(folder, [shard.name for shard in shards], folder.sizes())
            return [index.about["digests"] for index in indices]

        self._run(folder, shards, f"tokenizing {self.corpus.name}", digests)
        sizes = folder.sizes()
        of_each = np.asarray([index.about["sizes"] for index in indices])
        whole = make_manifest(self.corpus, self.tokenizer, of_each.sum(0), {})
        rows = [
            (shard.name, sizes[shard.name], n_tokens, n_documents)
            for shard, (n_tokens, n_documents, *_) in zip(shards, of_each.tolist(), strict=True)
        ]
        manifest = ShardedManifest(**asdict(whole), folder=name, shards=rows)
        key = store_key(self.corpus.digest, self.tokenizer.digest)
        content = json.dumps(asdict(manifest)).encode()
        open_shared_folder(self.place, key).write("manifest.json", content)
        self.by_name.write(self.mark + key, b"")
        return self._open(manifest)

    def _parts(self) -> Sequence[Part]:
        """Return the parts of the corpus; counts documents first if some are held out."""
        corpus = self.corpus
        if not isinstance(corpus, HeldOut):
            return corpus.parts() if isinstance(corpus, DocumentSource) else (corpus,)
        whole: Any = corpus.corpus
        parts = whole.parts()
        folder = open_shared_folder(self.place, _hash(_identity(whole), _plan(parts)) + ".counts")
        groups = _group(parts)
        tasks = [CountTask(f"{i:05d}.json", group) for i, group in enumerate(groups)]
        found: list[dict[str, Any]] = []

        def digests() -> list[list[str]]:
            contents = folder.read_each([task.name for task in tasks])
            found[:] = [parse_json(content, folder.place) for content in contents]
            return [each["digests"] for each in found]

        self._run(folder, tasks, f"counting the documents of {whole.name}", digests)
        counts = [count for each in found for count in each["counts"]]
        n_documents = [n for n, _ in counts]
        return (corpus,) if sum(n_documents) == 1 else corpus.sides_of(parts, n_documents)

    def _run(
        self,
        folder: SharedFolder,
        tasks: Sequence[Any],
        description: str,
        read_digests: Callable[[], list[list[str]]],
    ) -> None:
        """Run tasks, and hash files that span several parts.

        Results made from other contents, in files of equal size and time, are made again.
        """
        cut = {
            each.path: each.state
            for task in tasks
            for each in task.sources.parts
            if each.path is not None and not each.is_file
        }
        hashing = [
            DigestTask(f"{i:05d}.digest", path, state)
            for i, (path, state) in enumerate(cut.items())
        ]
        kinds = {SOURCES.kind, TOKENIZERS.kind}
        plugins = [plugin for plugin in SCHEMA.plugins() if kinds & plugin["registers"].keys()]
        build_together(
            folder,
            [*hashing, *tasks],
            self.workers,
            description,
            self.progress,
            plugins,
            partial(_use_cache, cache_directory(self.data)),
        )
        cut_files = [task.path for task in hashing]
        contents = folder.read_each([task.name for task in hashing])
        found = dict(zip(cut_files, (content.decode() for content in contents), strict=True))
        stale: set[str] = set()
        for task, digests in zip(tasks, read_digests(), strict=True):
            for each, digest in zip(task.sources.parts, digests, strict=True):
                digest = digest or found.get(each.path, "")
                known = digest and file_digests.known_digest(each.path, each.state)
                if known and known != digest:
                    stale.add(task.name)
                elif digest:
                    remember_digest(each.path, each.state, digest)
        if stale:
            for name in [*stale, *(task.name for task in hashing)]:
                folder.remove(name)
            self._run(folder, tasks, description, read_digests)


def _use_cache(folder: Path) -> None:
    file_digests.use_cache(lambda: folder)


def _identity(corpus: Any) -> str:
    """Return a digest of file names, sizes and times, equal for copies on several hosts."""
    if isinstance(corpus, HeldOut):
        return _hash(_identity(corpus.corpus), corpus.fraction, corpus.split)
    other = copy(corpus)
    vars(other).pop("digest", None)  # the digest of the contents
    with file_digests.hashing("identity"):
        return other.digest


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def _shard_size(parts: Sequence[Part]) -> int:
    return piece_size(sum(part.size or 0 for part in parts), SHARD)


def _plan(parts: Sequence[Part]) -> list[Any]:
    """Return what identifies a division into shards."""
    return [_VERSION, _shard_size(parts), [(part.name, part.size) for part in parts]]


def _group(parts: Sequence[Part]) -> list[PartGroup]:
    """Group consecutive parts into shards, depending on names and sizes only."""
    paths = [getattr(part, "path", None) for part in parts]
    n_parts = Counter(paths)
    states = {path: file_state(path) for path in n_parts if path is not None}
    groups: list[list[GroupedPart]] = []
    size, most = 0, _shard_size(parts)
    for part, path in zip(parts, paths, strict=True):
        n = part.size or 0
        if not groups or size + n > most:
            groups.append([])
            size = 0
        state = None if path is None else states[path]
        groups[-1].append(GroupedPart(part, path, state, n_parts[path] == 1))
        size += n
    return [PartGroup(tuple(group)) for group in groups]


def _read_indices(
    folder: SharedFolder, names: Sequence[str], sizes: dict[str, int]
) -> list[ShardIndex]:
    """Return the index of each shard."""
    starts = [max(sizes[name] - INDEX_READ, 0) for name in names]
    ends = folder.read_each(names, starts)
    return [
        read_index(folder, name, sizes[name], end) for name, end in zip(names, ends, strict=True)
    ]


def read_index(folder: SharedFolder, name: str, size: int, end: bytes = b"") -> ShardIndex:
    """Return the index of a shard file, whose last bytes may be given.

    Raises:
        DamagedShard: the file is damaged.
    """
    where = f"{folder.place}/{name}"
    index = parse_index(end or folder.read(name, max(size - INDEX_READ, 0)), where)
    if isinstance(index, int):
        index = parse_index(folder.read(name, max(size - index, 0)), where)
    if isinstance(index, int) or index.size != size:
        raise DamagedShard(f"{where} is damaged: remove this file")
    return index


# --- tasks


class GroupedPart(NamedTuple):
    """Part of a source with its file.

    Attributes:
        part: the part.
        path: its file, or None.
        state: state of the file when the work was planned.
        is_file: the part is the whole file, so its reader hashes it.
    """

    part: Part
    path: Any
    state: Any
    is_file: bool


@dataclass(frozen=True)
class PartGroup:
    """Consecutive parts of a source."""

    parts: tuple[GroupedPart, ...]

    @property
    def size(self) -> int:
        """Total bytes of the parts."""
        return sum(each.part.size or 0 for each in self.parts)

    def read(self, digests: list[str]) -> Iterator[Iterator[Chunk]]:
        """Yield the chunks of each part, and append its file's digest ("" for a partial file).

        Raises:
            UserError: a file has changed since the work was planned.
        """
        with file_digests.hashing_reads():
            for part, path, state, is_file in self.parts:
                if path is not None:
                    require_unchanged(path, state)
                yield part.chunks()
                if path is not None:
                    require_unchanged(path, state)
                digests.append(file_digest(path) if path is not None and is_file else "")


@dataclass(frozen=True)
class ShardTask:
    """Task that writes one shard.

    Attributes:
        name: name of its file.
        sources: parts of the shard.
        tokenizer: tokenizer of the documents.
        dtype: dtype of the tokens.
        workers: number of processes.
    """

    name: str
    sources: PartGroup
    tokenizer: Tokenizer
    dtype: np.dtype
    workers: int

    @property
    def size(self) -> int:
        return self.sources.size

    def make(self, path: Path, report: Report) -> None:
        """Write the shard file."""
        digests: list[str] = []
        chunks = chain.from_iterable(self.sources.read(digests))
        with ShardWriter(path, self.dtype) as writer:
            for block in tokenize_chunks(chunks, self.tokenizer, self.dtype, self.workers):
                writer.add(block)
                report(block.n_bytes)
            writer.finish({"digests": digests})


@dataclass(frozen=True)
class CountTask:
    """Task that counts documents and characters of each part.

    Attributes:
        name: name of the file of counts.
        sources: the parts.
    """

    name: str
    sources: PartGroup

    @property
    def size(self) -> int:
        return self.sources.size

    def make(self, path: Path, report: Report) -> None:
        """Write the file of counts."""
        digests: list[str] = []
        counts = []
        for chunks in self.sources.read(digests):
            n_documents = n_characters = 0
            for chunk in chunks:
                n_documents += chunk.first
                n_characters += len(chunk.text)
                report(len(chunk.text))
            counts.append((n_documents, n_characters))
        path.write_text(json.dumps({"counts": counts, "digests": digests}))


@dataclass(frozen=True)
class DigestTask:
    """Task that hashes a file that spans several parts.

    Attributes:
        name: name of the digest file.
        path: file to hash.
        state: its state when the work was planned.
    """

    name: str
    path: Any
    state: Any
    size: int = 0

    def make(self, path: Path, report: Report) -> None:
        """Write the digest file."""
        digest = file_digest(self.path)
        require_unchanged(self.path, self.state)
        path.write_text(digest)
