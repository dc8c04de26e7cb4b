"""Records with recordings: checked rows, log-mel features and tokens of the transcripts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Self

import numpy as np

from lm.data.audio.audio_inputs import read_features
from lm.data.audio.transcripts import SYNONYMS
from lm.data.audio.waveform import is_there
from lm.data.file_digests import hash_files
from lm.data.files import resolve_file
from lm.data.record_store import EncodedRecord, RecordEncoder
from lm.data.records import BadRow, Fields, Records
from lm.data.row_documents import MISSING, field_value
from lm.data.sources import RecordSource, Row
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError


@dataclass(frozen=True)
class Recordings(Records):
    """Records of "audio", the path of a recording, and "target", its transcript.

    A table may hold the recordings themselves, as `datasets.Audio` does: {"bytes": …, "path": …}.
    Their records have "content".

    Attributes:
        place: function that locates the file of a path in the source.
        n_mels: mel bins of the features.
        positions: longest recording in positions of the encoder, 20 ms each.
        workers: processes that read recordings; 0: one per core.
    """

    known: ClassVar[tuple[str, ...]] = ("audio", "target")
    synonyms: ClassVar = SYNONYMS

    place: Callable[[str], Any]
    n_mels: int
    positions: int

    @classmethod
    def of_source(cls, source: RecordSource, data: Any, **more: Any) -> Self:
        """Return the records of a source; see `Records.of_source`."""
        more |= {
            "place": partial(resolve_file, data=data),
            "n_mels": data.n_mels,
            "positions": data.sequence_length,
        }
        return super().of_source(source, data, **more)

    @cached_property
    def digest(self) -> str:
        """sha256 of the source, its settings and the contents of the recordings."""
        files = []
        for row in self.source.rows():
            name, content = _name_and_content(row, self._named(row)["audio"])
            if content is not None:
                break  # the source's own digest covers all recordings
            if isinstance(name, str) and "\0" not in name:
                path = self.place(name)
                files += [path] if is_there(path) else []
        return self.source.digest_with(repr((self._settings, hash_files(files, "recordings"))))

    @property
    def _settings(self) -> tuple[Any, ...]:
        return (*super()._settings, "recordings")

    def encoder(self, tokenizer: Tokenizer) -> RecordEncoder:
        """Return the encoder that computes the features and tokenizes the texts."""
        return RecordingEncoder(tokenizer, self.place, self.n_mels, self.positions)

    def _same_named(self, row: Row) -> dict[str, str]:
        found = self._named(row)
        if missing := [name for name, column in found.items() if column not in row.values]:
            there = getattr(self.source, "column_names", row.values)  # also columns not read
            raise UserError(
                f"{row.where}: no column {missing[0]!r} (available: {', '.join(there)}): set "
                f"--config.data.columns={missing[0]}=NAME"
            )
        return found

    def _named(self, row: Row) -> dict[str, str]:
        """Return the columns of a row: those of `columns`, or the first with a known name."""
        known = {name: (name, *self.synonyms[name]) for name in self.known}
        found = {
            name: next((column for column in names if column in row.values), name)
            for name, names in known.items()
        }
        return found | dict(self.columns)

    def _record(self, row: Row, columns: dict[str, str]) -> Fields:
        columns = self._named(row)
        name, content = _name_and_content(row, columns["audio"])
        named = row._replace(values=row.values | {columns["audio"]: name})
        record = super()._record(row if name is MISSING else named, columns)
        if "\0" in record["audio"]:
            raise BadRow(f"{record['audio']!r} is not a file name")
        return record if content is None else record | {"content": content}


def _name_and_content(row: Row, column: str) -> tuple[Any, bytes | None]:
    """Return the path of a row's recording, or the row's place for one without, and its bytes."""
    value = field_value(row.values, column)
    value = {"bytes": value} if isinstance(value, bytes) else value
    if not isinstance(value, Mapping) or not value.keys() & {"bytes", "path"}:
        return value, None
    name, content = value.get("path"), value.get("bytes")
    is_held = isinstance(content, bytes)
    return name or (str(row.where) if is_held else None), content if is_held else None


@dataclass(frozen=True)
class RecordingEncoder:
    """Encoder to log-mel features, float16, and tokens of the texts.

    Attributes:
        tokenizer: tokenizer of the texts.
        place: function that locates the file of a path in the record.
        n_mels: mel bins.
        length: longest recording in positions of the encoder; longer ones are refused.
    """

    tokenizer: Tokenizer
    place: Callable[[str], Any]
    n_mels: int
    length: int
    n_together: ClassVar[int] = 16

    @property
    def key(self) -> list[Any]:
        """Settings that affect the store besides tokenizer and records."""
        return ["log_mel", self.n_mels, self.length]

    def __call__(self, record: Fields) -> EncodedRecord:
        """Return the record with features "audio" [F, n_mels] and tokens "target".

        Raises:
            BadRow: the recording cannot be read, or is longer than `length`.
        """
        name, text, content = record["audio"], record["target"], record.get("content")
        path = self.place(name) if content is None else name
        features = read_features(path, self.n_mels, self.length, content)
        try:
            tokens = {"target": self.tokenizer.encode(text)}
        except UserError as error:
            raise BadRow(str(error)) from error
        sizes = {"target": len(text.encode())}
        return EncodedRecord(
            {"audio": name, "target": text},
            tokens,
            {},
            sizes,
            n_lost=0,
            cut=False,
            features={"audio": features.astype(np.float16)},
        )
