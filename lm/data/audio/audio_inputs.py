"""Features of recordings that are transcribed directly, without a store."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from lm.data.audio.log_mel import FRAMES_PER_POSITION, HOP, SAMPLE_RATE, log_mel, pad_frames
from lm.data.audio.transcripts import AudioFiles
from lm.data.audio.waveform import read_waveform
from lm.data.files import resolve_file
from lm.data.records import BadRow, parse_columns
from lm.data.row_documents import field_value
from lm.errors import UserError


@dataclass(frozen=True, eq=False)
class LazySource:
    """Features [length, M], computed when converted to an array, so that many fit in memory."""

    length: int
    read: Callable[[], np.ndarray]

    def __len__(self) -> int:
        return self.length

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def read_features(
    path: Any, n_mels: int, positions: int, content: bytes | None = None
) -> np.ndarray:
    """Return the log-mel features of a recording, float32 [F, n_mels] without its padding.

    Args:
        path: a `Path`, or a `UPath`; with `content` only a name for messages.
        n_mels: mel bins.
        positions: longest recording in positions of the encoder.
        content: content of the file; None reads it.

    Raises:
        BadRow: it cannot be read, or is longer.
    """
    n_frames = FRAMES_PER_POSITION * positions
    samples = read_waveform(path, n_frames * HOP / SAMPLE_RATE, content)
    return log_mel(samples, n_mels, n_frames)


def recording_sources(paths: Sequence[str], data: Any) -> list[LazySource]:
    """Return the features of files, padded to the longest recording, [F, n_mels] each.

    Args:
        paths: paths of recordings.
        data: section `data` of the configuration.

    Raises:
        UserError: when features are read: the file is not a recording, or is too long.
    """
    n_frames = FRAMES_PER_POSITION * data.sequence_length

    def read(path: str) -> np.ndarray:
        try:
            found = read_features(resolve_file(path), data.n_mels, data.sequence_length)
        except BadRow as bad:
            raise UserError(str(bad)) from bad
        return pad_frames(found, n_frames)

    return [LazySource(n_frames, partial(read, path)) for path in paths]


def find_recordings(place: str, data: Any) -> list[str]:
    """Return the paths of the recordings that PATH of the source `audio` names.

    Args:
        place: a recording, manifest, folder or glob, relative to the working directory.
        data: section `data` of the configuration.

    Raises:
        UserError: there are no recordings, or a row does not name one.
    """
    options = {"header": data.header, "columns": data.columns}
    here = SimpleNamespace(directory="", cache_directory="", **options)
    files = AudioFiles(place if "://" in place else os.path.abspath(place), here, "test")
    column = dict(parse_columns(data.columns)).get("audio", "audio")
    found = []
    for row in files.rows():
        name = field_value(row.values, column)
        if not isinstance(name, str):
            raise UserError(f"{row.where}: {row.problem or 'does not name a recording'}")
        found.append(name)
    return found
