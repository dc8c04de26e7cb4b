"""Source `tfds`: TensorFlow Datasets with random access, without TensorFlow."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from lm.data.sources import Chunk, DocumentSource, cut_document
from lm.errors import UserError


class TfdsCorpus(DocumentSource):
    """Split of a data set prepared with file_format="array_record".

    Documents are the strings in `data.field`. `data.directory` is the TFDS data_dir; if empty, TFDS
    uses its default (TFDS_DATA_DIR).
    """

    def __init__(self, argument: str, data: Any, split: str):
        """Open a split.

        Raises:
            UserError: the data set is unknown or not prepared, the split does not exist, or the
                field does not exist or is not text.
        """
        self.name, self.text_field = f"tfds:{argument}", data.field
        self.split = data.validation_split if split == "validation" else data.split
        self.builder = _builder(argument, _directory(data))
        features = self.builder.info.features
        if features is not None and self.text_field not in features:
            raise UserError(
                f"{self.name}: no field {self.text_field!r} (available: "
                f"{', '.join(sorted(features))}): set --config.data.field"
            )
        if features is not None and features[self.text_field].np_dtype not in (str, object):
            raise UserError(
                f"{self.name}: field {self.text_field!r} is not text: set --config.data.field"
            )
        splits = sorted(self.builder.info.splits)
        if splits and self.split not in splits:
            raise UserError(
                f"{self.name}: no split {self.split!r} (available: {', '.join(splits)})"
            )
        self.source = _open_split(self.builder, argument, self.split)

    @classmethod
    def has_validation_split(cls, argument: str, data: Any) -> bool:
        """Return whether the prepared data set has split `data.validation_split`."""
        return data.validation_split in _builder(argument, _directory(data)).info.splits

    @cached_property
    def digest(self) -> str:
        info = self.builder.info
        split = info.splits.get(self.split)
        identity = {
            "name": info.full_name,
            "config": self.builder.builder_config and self.builder.builder_config.name,
            "split": self.split,
            "field": self.text_field,
            "examples": len(self.source),
            "shards": split and list(split.shard_lengths),
            "bytes": split and split.num_bytes,
            "download": info.download_size,
        }
        return hashlib.sha256(
            json.dumps(identity, sort_keys=True, default=str).encode()
        ).hexdigest()

    def chunks(self) -> Iterator[Chunk]:
        for index in range(len(self.source)):
            text = self.source[index][self.text_field]
            yield from cut_document([text.decode() if isinstance(text, bytes) else str(text)])


def _directory(data: Any) -> str | None:
    return data.directory or os.environ.get("TFDS_DATA_DIR")


def _builder(name: str, directory: str | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=directory)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"tfds:{name}: no such data set ({reason})") from error


def _open_split(builder: Any, name: str, split: str) -> Any:
    try:
        return builder.as_data_source(split=split)
    except (NotImplementedError, AssertionError, FileNotFoundError, ValueError) as error:
        prepare = f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        raise UserError(
            f"tfds:{name}: not prepared as array_record in {builder.data_dir}: run {prepare}, "
            "or set TFDS_DATA_DIR or --config.data.directory to its folder"
        ) from error
