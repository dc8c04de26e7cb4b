"""Record store: task records, encoded once and memory-mapped; packing of short ones."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, ClassVar, NamedTuple, Protocol

import numpy as np

from lm.data.records import TEXT_COLUMNS, BadRow, Fields, Records
from lm.data.store import map_array, require_checksums, store_checksums
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.progress import track
from lm.storage import DamagedFolder, open_or_build, read_json, write_durably

_FORMAT = 2
_FEW = 128  # records that are encoded faster than processes start

# Scripts without spaces between words: every character is a word, as in BERT's vocabulary.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Accents and vowel signs belong to the letter before them, but re does not count them as \w.
_MARKS = "".join(chr(i) for i in range(0x10000) if unicodedata.category(chr(i))[0] == "M")
_WORD = re.compile(rf"[{_ALONE}]|(?:(?![{_ALONE}])[\w{_MARKS}])+|[^\w\s{_MARKS}]")


WITH_OFFSETS = {"context", "words"}  # columns; a record has at most one of them


@dataclass(frozen=True)
class RecordManifest:
    """Origin and sizes of a record store.

    Attributes:
        format: version of the store's layout.
        source: name of the source.
        source_digest: digest of the records.
        tokenizer_digest: digest of the tokenizer.
        dtype: dtype of the tokens.
        n_rows: number of records.
        n_skipped: number of bad rows that were skipped.
        first_skipped: problem with the first of them.
        n_tokens: tokens by column.
        n_bytes: bytes of UTF-8 text by column.
        checksums: CRC-32 of each block of each file.
        turns: columns that are conversations.
        n_cut: conversations whose last turns were cut off because they did not fit.
        n_dropped: conversations without any learned turn that fits.
        n_lost: tokens to be learned that were cut off or dropped.
        length: longest conversation in tokens, or recording in positions; 0: any.
        features: width of the features by column, float16 [frames, width] per record.
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
    checksums: dict[str, list[int]]
    turns: list[str] = field(default_factory=list)
    n_cut: int = 0
    n_dropped: int = 0
    n_lost: int = 0
    length: int = 0
    features: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Record:
    """One record.

    Attributes:
        raw: the record as it was read.
        tokens: tokens of its texts by column, int32 [n] each, without bos and eos.
        starts: int32 [n]: token i of the context is raw["context"][starts[i]:ends[i]], and token
            i of words belongs to word starts[i]; None without a context or words.
        ends: see `starts`.
        turns: learned spans of the conversations by column, int32 [n, 3]: first token, end
            token (exclusive), index of the message.
        features: features by column, float16 [frames, width] each, such as those of a recording.
    """

    raw: Fields
    tokens: dict[str, np.ndarray]
    starts: np.ndarray | None
    ends: np.ndarray | None
    turns: dict[str, np.ndarray] = field(default_factory=dict)
    features: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class RecordStore:
    """Records of a source, or some of them, memory-mapped.

    Attributes:
        directory: folder of the store.
        manifest: origin and sizes of the whole store.
        arrays: contents of the files by name.
        rows: indices of the records, int64 [n].
    """

    directory: Path
    manifest: RecordManifest
    arrays: dict[str, np.ndarray]
    rows: np.ndarray

    def select(self, indices: np.ndarray) -> RecordStore:
        """Return the store of the records at these indices."""
        return replace(self, rows=self.rows[indices])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index = self.rows[index]
        columns = self.manifest.n_tokens
        tokens = {column: self._row(column, index).astype(np.int32) for column in columns}
        raw = json.loads(self._row("raw", index).tobytes())
        if not WITH_OFFSETS & columns.keys():
            names = self.manifest.turns
            turns = {name: self._row(f"{name}.turns", index).reshape(-1, 3) for name in names}
            features = {name: self._row(name, index) for name in self.manifest.features}
            return Record(raw, tokens, None, None, turns, features)
        return Record(raw, tokens, self._row("starts", index), self._row("ends", index))

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all texts."""
        return sum(int(self.lengths(column).sum()) for column in self.manifest.n_tokens)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def lengths(self, column: str) -> np.ndarray:
        """Return each record's number of tokens, or of frames, in a column, int64 [n]."""
        return np.diff(self.arrays[f"{column}.offsets"])[self.rows]

    def n_targets(self, column: str) -> np.ndarray:
        """Return the number of learned tokens in each conversation, int64 [n]."""
        spans = self.arrays[f"{column}.turns"].reshape(-1, 3)
        before = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])])
        return np.diff(before[self.arrays[f"{column}.turns.offsets"] // 3])[self.rows]

    def _row(self, name: str, index: int) -> np.ndarray:
        start, end = self.arrays[f"{name}.offsets"][index : index + 2]
        return self.arrays[name][start:end]


def build_record_store(
    records: Records,
    tokenizer: Tokenizer,
    cache_directory: str | Path,
    progress: bool = False,
    workers: int = 1,
) -> RecordStore:
    """Open a record store, tokenizing the records first if it is not in the cache.

    The progress bar and the number of rows skipped go to stderr.

    Args:
        records: records of a source.
        tokenizer: tokenizer of their texts.
        cache_directory: folder of the cache.
        progress: show a progress bar.
        workers: processes that encode, 0 for one per core; the store does not depend on it.

    Returns:
        The store.

    Raises:
        UserError: rows are bad or cannot be encoded, or the disk is full.
    """
    encoder = records.encoder(tokenizer)
    settings = [encoder.key] if encoder else []
    recipe = json.dumps([_FORMAT, tokenizer.digest, records.digest, *settings])
    key = hashlib.sha256(recipe.encode()).hexdigest()[:32]
    store = open_or_build(
        Path(cache_directory) / "records" / key,
        partial(_open, source=records.name),
        lambda folder: _write(folder, records, tokenizer, encoder, progress, workers),
    )
    manifest = store.manifest
    if manifest.n_cut or manifest.n_dropped:
        print(f"{records.name}: {what_was_cut(manifest)}", file=sys.stderr)
    if skipped := store.manifest.n_skipped:
        of = skipped + len(store)
        first = store.manifest.first_skipped
        print(f"{records.name}: skipped {skipped} of {of} rows; first: {first}", file=sys.stderr)
    return store


def what_was_cut(manifest: RecordManifest) -> str:
    """Describe how many conversations of a store were cut or dropped."""
    n = manifest.n_rows + manifest.n_dropped
    return (
        f"of {n:,} conversations {manifest.n_cut:,} were truncated after a turn and "
        f"{manifest.n_dropped:,} dropped, for exceeding {manifest.length:,} tokens: "
        f"{manifest.n_lost:,} target tokens are lost"
    )


class EncodedRecord(NamedTuple):
    """Encoded record to be stored.

    Attributes:
        raw: the record.
        tokens: token ids by column.
        turns: learned spans by column, for conversations, int32 [n, 3] (`Record.turns`).
        n_bytes: bytes of UTF-8 text by column.
        n_lost: tokens to be learned that were cut off.
        cut: whether turns were cut off.
        features: features by column, float16 [frames, width].
    """

    raw: Fields
    tokens: dict[str, np.ndarray]
    turns: dict[str, np.ndarray]
    n_bytes: dict[str, int]
    n_lost: int = 0
    cut: bool = False
    features: Mapping[str, np.ndarray] = MappingProxyType({})


class RecordEncoder(Protocol):
    """Function that encodes a record for the store, such as a conversation or a recording.

    Attributes:
        key: all settings that affect the result besides the tokenizer.
        length: longest conversation in tokens, or recording in positions; 0: any.
        n_together: records that a worker process encodes at once; 0: encode in this process.
    """

    n_together: ClassVar[int]

    @property
    def key(self) -> list[Any]: ...

    @property
    def length(self) -> int: ...

    def __call__(self, record: Fields) -> EncodedRecord | int:
        """Return the encoded record, or the number of tokens to learn if it is dropped.

        Raises:
            BadRow: it cannot be encoded.
        """
        ...


def _write(
    folder: Path,
    records: Records,
    tokenizer: Tokenizer,
    encoder: RecordEncoder | None,
    progress: bool,
    workers: int,
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    skipped: list[str] = []
    rows = records.read(skipped.append)
    writers = _Writers(folder, dtype)
    shown = track(rows, None, description=f"tokenizing {records.name}", shown=progress, unit="row")
    if encoder:
        encoded = _encode(shown, encoder, workers)
        counts = _write_encoded(encoded, records, encoder, writers, skipped)
    else:
        counts = _write_texts(shown, tokenizer, writers)
    writers.close()
    n_tokens = {column: writers.size(column) for column in writers.n_bytes}
    for column in (column for column, size in n_tokens.items() if not size):
        raise UserError(f"{records.name}: the vocabulary has no token for any {column}")
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
        n_bytes=dict(writers.n_bytes),
        checksums=store_checksums(folder),
        **counts,
    )
    write_durably(folder / "manifest.json", json.dumps(asdict(manifest), indent=2).encode())


def _write_texts(
    rows: Iterable[tuple[Fields, str]], tokenizer: Tokenizer, writers: _Writers
) -> dict[str, Any]:
    encode = lru_cache(2**16)(tokenizer.encode)  # contexts and their words repeat
    tokenize_context = lru_cache(16)(tokenize_with_offsets)
    for record, where in rows:
        for column in (column for column in TEXT_COLUMNS if column in record):
            try:
                if column in WITH_OFFSETS:
                    tokenize = tokenize_context if column == "context" else tokenize_words
                    tokens, starts, ends = tokenize(record[column], encode)
                    writers.append("starts", starts)
                    writers.append("ends", ends)
                else:
                    tokens = tokenizer.encode(record[column])
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            writers.append_tokens(column, tokens, len(record[column].encode()))
        writers.append_raw(record)
    return {}


Encoded = EncodedRecord | int | BadRow


def _encode(
    rows: Iterable[tuple[Fields, str]], encoder: RecordEncoder, workers: int
) -> Iterator[tuple[Encoded, str]]:
    """Yield encoded records and their places; uses processes if there are many."""
    workers, n = workers or os.cpu_count() or 1, encoder.n_together
    rows = iter(rows)
    head = list(islice(rows, _FEW)) if n and workers > 1 else []
    rows = chain(head, rows)
    if len(head) < _FEW:
        yield from _encode_here(encoder, rows)
        return
    from lm.data.tokenizing_pool import encode_in_processes

    groups = iter(lambda: list(islice(rows, n)), [])
    for found in encode_in_processes(groups, partial(_encode_list, encoder), workers):
        yield from found


def _encode_list(
    encoder: RecordEncoder, group: list[tuple[Fields, str]]
) -> list[tuple[Encoded, str]]:
    return list(_encode_here(encoder, group))


def _encode_here(
    encoder: RecordEncoder, rows: Iterable[tuple[Fields, str]]
) -> Iterator[tuple[Encoded, str]]:
    for record, where in rows:
        try:
            yield encoder(record), where
        except BadRow as bad:
            yield bad, where


def _write_encoded(
    rows: Iterable[tuple[Encoded, str]],
    records: Records,
    encoder: RecordEncoder,
    writers: _Writers,
    skipped: list[str],
) -> dict[str, Any]:
    """Write encoded records; return their counts for the manifest."""
    counts = Counter(n_cut=0, n_dropped=0, n_lost=0)
    turns: set[str] = set()
    widths: dict[str, int] = {}
    for found, where in rows:
        if isinstance(found, BadRow):
            records.skip_or_raise(f"{where}: {found}", skipped.append)
            continue
        if isinstance(found, int):
            counts.update(n_dropped=1, n_lost=found)
            continue
        counts.update(n_cut=found.cut, n_lost=found.n_lost)
        for column, tokens in found.tokens.items():
            writers.append_tokens(column, tokens, found.n_bytes[column])
        for column, spans in found.turns.items():
            writers.append(f"{column}.turns", spans.astype(np.int32).reshape(-1))
            turns.add(column)
        for column, features in found.features.items():
            writers.append(column, features)
            widths[column] = features.shape[1]
        writers.append_raw(found.raw)
    if "raw" not in writers.lengths:
        raise UserError(
            f"{records.name}: no turn of any conversation fits into {encoder.length} tokens: set "
            "--config.data.sequence_length"
            if counts["n_dropped"]
            else f"{records.name} has no usable record; the first: {skipped[0]}"
        )
    return {"turns": sorted(turns), "length": encoder.length, "features": widths, **counts}


class _Writers:
    """Writer of ragged arrays: NAME.bin has the rows, NAME.offsets.bin their offsets."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self._folder, self._dtype = folder, dtype
        self.n_bytes: Counter[str] = Counter()
        self._files: dict[str, BinaryIO] = {}
        self.lengths: dict[str, list[int]] = {}

    def append(self, name: str, row: np.ndarray) -> None:
        if name not in self._files:
            self._files[name] = open(self._folder / f"{name}.bin", "wb")  # noqa: SIM115
            self.lengths[name] = []
        self._files[name].write(row.tobytes())
        self.lengths[name].append(len(row))

    def append_tokens(self, column: str, tokens: np.ndarray, n_bytes: int) -> None:
        self.append(column, tokens.astype(self._dtype))
        self.n_bytes[column] += n_bytes

    def append_raw(self, record: Fields) -> None:
        self.append("raw", np.frombuffer(json.dumps(record).encode(), np.uint8))

    def size(self, name: str) -> int:
        return sum(self.lengths[name])

    def close(self) -> None:
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            offsets = np.cumsum([0, *self.lengths[name]], dtype=np.int64)
            write_durably(self._folder / f"{name}.offsets.bin", offsets.tobytes())


def _open(folder: Path, source: str) -> RecordStore:
    try:
        manifest = RecordManifest(**(read_json(folder / "manifest.json") | {"source": source}))
        require_checksums(folder, manifest.checksums)
        dtypes = dict.fromkeys(manifest.n_tokens, manifest.dtype) | {"raw": "uint8"}
        if WITH_OFFSETS & dtypes.keys():
            dtypes |= {"starts": "int32", "ends": "int32"}
        dtypes |= {f"{column}.turns": "int32" for column in manifest.turns}
        dtypes |= dict.fromkeys(manifest.features, "float16")
        arrays = {}
        for name, dtype in dtypes.items():
            offsets = map_array(folder / f"{name}.offsets.bin", "int64", manifest.n_rows + 1)
            arrays[f"{name}.offsets"] = offsets
            width = manifest.features.get(name, 0)
            flat = map_array(folder / f"{name}.bin", dtype, int(offsets[-1]) * (width or 1))
            arrays[name] = flat.reshape(-1, width) if width else flat
    except (OSError, ValueError, TypeError, AttributeError, UserError) as error:
        raise DamagedFolder(f"{type(error).__name__}: {error}") from error
    return RecordStore(folder, manifest, arrays, np.arange(manifest.n_rows))


class TokenOffsets(NamedTuple):
    """Tokens and their offsets: token i is text[starts[i]:ends[i]]; int32 [n] each."""

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def tokenize_with_offsets(text: str, encode: Callable[[str], np.ndarray]) -> TokenOffsets:
    """Tokenize a text word by word, with any tokenizer; tokens get the offsets of their word.

    A word is a run of letters and digits, a single Chinese or Japanese character, or a single
    punctuation mark. Whitespace between two words counts as one space.
    """
    parts: list[np.ndarray] = []
    starts, ends = [], []
    before, previous = "", 0
    for word in _WORD.finditer(text):
        gap = " " if word.start() > previous else ""
        parts.append(_encode_after(before, gap + word.group(), encode))
        before, previous = word.group()[-1], word.end()
        starts.append(word.start())
        ends.append(previous)
    sizes = [len(part) for part in parts]
    return TokenOffsets(
        np.concatenate([np.zeros(0, np.int32), *parts]),
        np.repeat(np.asarray(starts, np.int32), sizes),
        np.repeat(np.asarray(ends, np.int32), sizes),
    )


def tokenize_words(text: str, encode: Callable[[str], np.ndarray]) -> TokenOffsets:
    """Tokenize words between single spaces; the offsets are the indices of the words."""
    parts: list[np.ndarray] = []
    before = ""
    for word in text.split(" "):
        parts.append(_encode_after(before, f" {word}" if before else word, encode))
        before = word[-1]
    sizes = [len(part) for part in parts]
    indices = np.arange(len(parts), dtype=np.int32)
    return TokenOffsets(
        np.concatenate(parts), np.repeat(indices, sizes), np.repeat(indices + 1, sizes)
    )


def _encode_after(before: str, text: str, encode: Callable[[str], np.ndarray]) -> np.ndarray:
    """Return the tokens that `text` adds to those of the character before it.

    This avoids that a vocabulary that marks the start of words (T5's, ALBERT's) marks every comma.
    A text that merges with that character, or becomes one unknown word with it, is encoded alone.
    """
    head, whole = encode(before), encode(before + text)
    if len(whole) > len(head) and (whole[: len(head)] == head).all():
        return whole[len(head) :]
    return encode(text)


# --- packing: several short records share one row of a batch

_OPEN = 64  # packs that a record may be added to; more would hardly fill rows better


@dataclass(frozen=True, eq=False)
class Packs:
    """Partition of records into packs: pack i holds indices[offsets[i]:offsets[i + 1]].

    Attributes:
        indices: [n_records] int64.
        offsets: [n_packs + 1] int64.
    """

    indices: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        return self.indices[self.offsets[index] : self.offsets[index + 1]]

    def fill(self, lengths: np.ndarray, limits: Sequence[int]) -> np.ndarray:
        """Return the fraction of each limit that the packs use on average, float64 [k]."""
        used = np.minimum(lengths, limits).sum(0)
        return used / (len(self) * np.asarray(limits))


def pack_records(lengths: np.ndarray, limits: Sequence[int], seed: int) -> Packs:
    """Pack records by first-fit in a random order, so that no sum of lengths exceeds its limit.

    A record goes to the first of the 64 open packs that has room, or opens one that replaces the
    fullest. A record that exceeds a limit alone gets its own pack.

    Args:
        lengths: [n, k], such as tokens of source and target.
        limits: [k].
        seed: seed of the order.

    Returns:
        The packs.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    scale = 1 / np.asarray(limits)[:, None]
    room = np.full((len(limits), _OPEN), -1, np.int64)  # no pack yet: not even an empty record fits
    packs_open = np.zeros(_OPEN, np.int64)
    pack_of = np.empty(len(lengths), np.int64)  # by position in `order`
    n_packs = 0
    for place, needed in enumerate(np.asarray(lengths)[order]):
        fits = (room >= needed[:, None]).all(0)
        slot = int(fits.argmax())
        if not fits[slot]:
            slot = int((room * scale).min(0).argmin())
            room[:, slot] = limits
            packs_open[slot] = n_packs
            n_packs += 1
        room[:, slot] -= needed
        pack_of[place] = packs_open[slot]
    counts = np.bincount(pack_of, minlength=n_packs)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Packs(order[np.argsort(pack_of, kind="stable")], offsets)


@dataclass(frozen=True, eq=False)
class PackedRecords:
    """Records of a store, several per row according to `packs`."""

    store: RecordStore
    packs: Packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, list[Record]]:
        return {"records": [self.store[int(i)] for i in self.packs[index]]}
