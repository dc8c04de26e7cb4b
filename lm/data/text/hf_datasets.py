"""Source `datasets`: data sets of the Hugging Face library, from the hub or a folder.

They are streamed. Code in a data set is never executed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from lm.data.file_digests import hash_files
from lm.data.files import is_folder, resolve_file
from lm.data.remote import storage_errors
from lm.data.row_documents import RowDocuments
from lm.data.sources import Chunk, RecordSource, Row
from lm.data.text.columnar import ArrowFiles, as_named, as_question, feature_names, is_qa
from lm.errors import UserError, missing_package


class HuggingFaceDatasets(RowDocuments, RecordSource):
    """Split of NAME, NAME:CONFIG or a folder: documents in `data.field`, or records.

    A folder was written by `save_to_disk` (read as `arrow:FOLDER`), or holds files that
    `datasets.load_dataset` supports.
    """

    row_word = "rows"

    def __init__(self, argument: str, data: Any, split: str):
        self.name, self.columns = f"datasets:{argument}", data.columns
        self.set_field(data)
        self.saved = ArrowFiles(argument, data, split) if _is_saved(argument, data) else None
        if self.saved:
            return
        self.place, self.config = _place(argument, data)
        self.split = data.validation_split if split == "validation" else data.split
        with storage_errors(self.name, "hf"):
            splits = _splits(self._builder)
        if self.split not in splits:
            known = ", ".join(splits) or "none"
            raise UserError(f"{self.name}: no split {self.split!r} (available: {known})")

    @classmethod
    def has_validation_split(cls, argument: str, data: Any) -> bool:
        """Return whether the data set has split `data.validation_split`."""
        if _is_saved(argument, data):
            return ArrowFiles.has_validation_split(argument, data)
        name = f"datasets:{argument}"
        with storage_errors(name, "hf"):
            return data.validation_split in _splits(_open_builder(name, *_place(argument, data)))

    @cached_property
    def _builder(self) -> Any:
        return _open_builder(self.name, self.place, self.config)

    @cached_property
    def digest(self) -> str:
        """sha256 of the contents, from the digests that the hub reports."""
        if self.saved:
            return self.saved.digest
        with storage_errors(self.name, "hf"):
            files = (self._builder.config.data_files or {})[self.split]
            if not any("://" in str(file) for file in files):
                settings = (self.config or "", self.split, self.field)
                return hash_files(map(Path, files), "datasets", *settings)
            stated = [_stated_content(str(file)) for file in files]
        recipe = [self.place, self.config, self.split, self.field, stated]
        return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()

    def chunks(self) -> Iterator[Chunk]:
        if self.saved:
            yield from self.saved.chunks()
        else:
            yield from self.row_documents(Path(self.name), self._read((self.field,)))

    def rows(self) -> Iterator[Row]:
        if self.saved:
            self.saved.known_columns = self.known_columns
            yield from self.saved.rows()
            return
        labels = feature_names(self._features.to_dict() if self._features else {})
        for row in self._read(()):
            yield as_question(row) if self.has_answers else as_named(row, labels)

    @property
    def has_answers(self) -> bool:  # type: ignore[override]
        """True if rows are questions with answers, in SQuAD's format."""
        if self.saved:
            return self.saved.has_answers
        return not self.columns and is_qa(self._features or ())

    @cached_property
    def _features(self) -> Any:
        with storage_errors(self.name, "hf"):
            return self._stream.features

    @cached_property
    def _stream(self) -> Any:
        stream = self._builder.as_streaming_dataset(self.split)
        is_coded = any(hasattr(one, "decode") for one in (stream.features or {}).values())
        return stream.decode(False) if is_coded else stream  # audio as bytes or paths

    def _read(self, fields: tuple[str, ...]) -> Iterator[Row]:
        """Yield rows, restricted to the columns of these fields if columns are known."""
        with storage_errors(self.name, "hf"):
            stream, features = self._stream, self._features
            wanted = [
                name for name in features or () for f in fields if f"{f}.".startswith(f"{name}.")
            ]
            if wanted:
                stream = stream.select_columns(sorted(set(wanted)))
            for number, values in enumerate(stream, start=1):
                yield Row(f"{self.name}: row {number}", values)


def _is_saved(argument: str, data: Any) -> bool:
    """Return whether an argument is a folder written by `save_to_disk`."""
    folder = resolve_file(argument, data)
    marks = ("state.json", "dataset_dict.json")
    return isinstance(folder, Path) and any((folder / mark).is_file() for mark in marks)


def _place(argument: str, data: Any) -> tuple[str, str | None]:
    """Return the folder or name, and the configuration of NAME:CONFIG."""
    folder = resolve_file(argument, data)
    if is_folder(folder):
        return str(folder), None
    name, _, config = argument.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(
            f"datasets:{argument}: neither a folder nor the name of a data set on the Hub"
        )
    return name, config or None


def _open_builder(name: str, place: str, config: str | None) -> Any:
    try:
        from datasets import load_dataset_builder
    except ImportError as error:
        raise missing_package(name, "datasets", "datasets") from error
    with storage_errors(name, "hf"):
        return load_dataset_builder(place, config)


def _splits(builder: Any) -> list[str]:
    return sorted(map(str, builder.info.splits or builder.config.data_files or ()))


def _stated_content(url: str) -> list[str]:
    """Return a hub file's name and the content digest that the hub reports."""
    from huggingface_hub import HfFileSystem

    info = HfFileSystem().info(url)
    lfs = info.get("lfs") or {}
    name = re.sub(r"@[0-9a-f]{40}(?=/)", "", url)
    return [name, str(lfs.get("sha256") or info.get("blob_id") or info.get("size"))]
