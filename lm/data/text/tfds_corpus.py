"""Corpora from TensorFlow Datasets, read by random access and without TensorFlow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lm.data.text.corpus import Chunk, cut_document
from lm.errors import UserError


@dataclass(frozen=True)
class TfdsCorpus:
    """A split of a prepared TFDS data set; the string in `text_field` is the document."""

    name: str
    split: str
    text_field: str
    builder: Any = field(repr=False)
    source: Any = field(repr=False)

    size = None

    @cached_property
    def digest(self) -> str:
        info = self.builder.info
        split = info.splits.get(self.split)
        known = {
            "name": info.full_name,
            "config": self.builder.builder_config and self.builder.builder_config.name,
            "split": self.split,
            "field": self.text_field,
            "examples": len(self.source),
            "shards": split and list(split.shard_lengths),
            "bytes": split and split.num_bytes,
            "download": info.download_size,
        }
        return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()

    def chunks(self) -> Iterator[Chunk]:
        for index in range(len(self.source)):
            text = self.source[index][self.text_field]
            yield from cut_document([text.decode() if isinstance(text, bytes) else str(text)])


def open_tfds(name: str, split: str, text_field: str, directory: str | None) -> TfdsCorpus:
    """Opens a split of a data set that was prepared with file_format="array_record".

    `directory` is the TFDS data_dir; None leaves it to TFDS (TFDS_DATA_DIR). Raises UserError for
    an unknown name, unprepared data, an unknown split, and a field that is not there or not text.
    """
    builder = _builder(name, directory)
    features = builder.info.features
    if features is not None and text_field not in features:
        raise UserError(
            f"tfds:{name}: no field {text_field!r} (there are: {', '.join(sorted(features))}): "
            "set --config.data.field"
        )
    if features is not None and features[text_field].np_dtype not in (str, object):
        raise UserError(f"tfds:{name}: field {text_field!r} is not text: set --config.data.field")
    splits = sorted(builder.info.splits)
    if splits and split not in splits:
        raise UserError(f"tfds:{name}: no split {split!r} (there are: {', '.join(splits)})")
    return TfdsCorpus(f"tfds:{name}", split, text_field, builder, _source(builder, name, split))


def has_split(name: str, split: str, directory: str | None) -> bool:
    """Whether the prepared data set has the split."""
    return split in _builder(name, directory).info.splits


def _builder(name: str, directory: str | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=directory)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"tfds:{name}: no such data set ({reason})") from error


def _source(builder: Any, name: str, split: str) -> Any:
    try:
        return builder.as_data_source(split=split)
    except (NotImplementedError, AssertionError, FileNotFoundError, ValueError) as error:
        prepare = f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        raise UserError(
            f"tfds:{name}: not prepared as array_record in {builder.data_dir}: run {prepare}, "
            "or set TFDS_DATA_DIR or --config.data.directory to where it lies"
        ) from error
