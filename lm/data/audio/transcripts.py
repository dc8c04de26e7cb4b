"""Source `audio`: recordings and transcripts, from folders and manifests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.data.compression import ENDINGS, file_name
from lm.data.files import find_files, is_folder, read_lines, resolve_file
from lm.data.records import CsvFiles, RowFiles, TsvFiles, parse_columns, read_jsonl_rows, table_rows
from lm.data.sources import Row
from lm.errors import UserError

# Files in a folder that list recordings: Hugging Face's audiofolder and LibriSpeech.
_MANIFESTS = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "*.trans.txt")
_TABLES = {".csv": CsvFiles, ".tsv": TsvFiles}
_RECORDINGS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64")
# Names of the columns of recordings and texts, as in audiofolder, LibriSpeech and NeMo.
SYNONYMS = {"audio": ("file_name", "audio_filepath"), "target": ("transcription", "text")}


class AudioFiles(RowFiles):
    """Rows that name a recording in the column "audio" or a synonym, relative to their file.

    PATH is a manifest (JSON lines, CSV, TSV, or LibriSpeech's ID.trans.txt), a recording without a
    text, a glob of such files, or a folder: all manifests in it, or else all recordings.
    """

    kind = "audio"
    same_columns = False

    def __init__(self, argument: str, data: Any, split: str):
        self.name, self.header = f"audio:{argument}", data.header
        self.files = tuple((path,) for path in _find(argument, data))
        named = dict(parse_columns(data.columns)).get("audio")
        self._columns = (named,) if named else ("audio", *SYNONYMS["audio"])

    def rows(self) -> Iterator[Row]:
        for (path,) in self.files:
            for row in _rows(path, self.header):
                yield row._replace(values=self._located(path, row.values))

    def _located(self, path: Path, values: dict[str, Any]) -> dict[str, Any]:
        """Return a row's values, the recording's path relative to the working directory."""
        column = next((name for name in self._columns if name in values), "")
        value = values.get(column)
        name = value.get("path") if isinstance(value, dict) else value  # of `datasets.Audio`
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            return values
        place = name if "://" in name else str(path.parent / name)
        return values | {self._columns[0]: place}


def _find(argument: str, data: Any) -> list[Path]:
    """Return the files that PATH names."""
    if not is_folder(resolve_file(argument, data)):
        return list(find_files(argument, data))
    for names in (_MANIFESTS, [f"*{ending}" for ending in _RECORDINGS]):
        found: set[Path] = set()
        for name in names:
            try:
                found.update(find_files(f"{argument.rstrip('/')}/**/{name}", data))
            except UserError:
                continue  # not a file of this kind
        if found:
            return sorted(found)
    raise UserError(
        f"audio:{argument}: the folder has neither {', '.join(_MANIFESTS)} nor recordings (for "
        "tables with recordings, use parquet:FILES, arrow:FOLDER or datasets:FOLDER)"
    )


def _rows(path: Path, header: bool) -> Iterator[Row]:
    name = file_name(path).lower()
    stem = Path(name).stem if Path(name).suffix in ENDINGS else name
    ending = Path(stem).suffix
    if ending in (".jsonl", ".json"):
        yield from read_jsonl_rows(path)
    elif ending in _TABLES:
        yield from table_rows(path, _TABLES[ending].lines(path), header)
    elif ending == ".txt":
        yield from _librispeech_rows(path)
    else:
        yield Row(path, {"audio": path.name})


def _librispeech_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file with lines "ID TEXT", next to recordings ID.flac."""
    for number, line in enumerate(read_lines(path), start=1):
        name, _, text = line.strip().partition(" ")
        if name:
            problem = "" if text.strip() else f"no text after {name!r}"
            yield Row(
                f"{path}:{number}", {"audio": f"{name}.flac", "target": text.strip()}, problem
            )
