"""Recordings of any libsndfile format, rate and number of channels, read as mono at 16 kHz.

Formats are those of the package `soundfile`: WAV, FLAC, OGG (Vorbis, Opus), MP3, AIFF and others.
"""

from __future__ import annotations

import io
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from scipy.signal import resample_poly

from lm.data.audio.log_mel import SAMPLE_RATE
from lm.data.file_digests import raw_file, require_unchanged
from lm.data.records import BadRow
from lm.errors import missing_package

_RATES = range(1000, 768_001)  # Hz; the resampling filter has 20 coefficients for each
_BLOCK = 2**26  # samples of all channels read at once
_UNKNOWN = (
    2**31 - 2**12
)  # sizes in bytes or samples that streaming programs write instead of the real ones
# libsndfile's note about a WAV or AIFF file that is shorter than its header says.
_CUT = re.compile(r"(?:data|SSND) : (\d+) \(should be (\d+)\)")


def read_waveform(path: Any, max_seconds: float, content: bytes | None = None) -> np.ndarray:
    """Return the samples of a recording, channels averaged, float32 [n] at 16 kHz.

    Args:
        path: a `Path`, or a `UPath`; with `content` only a name for messages.
        max_seconds: maximum length; reading stops there.
        content: content of the file; None reads it.

    Raises:
        BadRow: the file is missing, damaged, cut, empty, too long or not a recording.
        UserError: the package `soundfile` is not installed.
    """
    try:
        import soundfile
    except ImportError as error:
        raise missing_package("reading audio", "soundfile", "audio") from error
    if content is None and not is_there(path):
        raise BadRow(f"no file {path}")
    try:
        file = raw_file(path) if content is None else io.BytesIO(content)
        with file, soundfile.SoundFile(file) as sound:
            samples = _read(sound, path, max_seconds)
        if content is None:
            require_unchanged(path)
    except soundfile.LibsndfileError as error:
        raise BadRow(f"{path}: not a recording, or damaged ({error.error_string})") from error
    except OSError as error:
        raise BadRow(f"{path}: cannot be read ({error.strerror})") from error
    return samples


def is_there(path: Any) -> bool:
    """Return whether there is a file at a `Path` or `UPath`."""
    if isinstance(path, Path):
        return os.path.isfile(path)
    from lm.data.remote import remote_exists

    return remote_exists(path)


def _read(sound: Any, path: Any, max_seconds: float) -> np.ndarray:
    rate, most = sound.samplerate, math.floor(max_seconds * sound.samplerate)
    if rate not in _RATES:
        raise BadRow(f"{path}: {rate} samples per second, not {_RATES[0]} to {_RATES[-1]}")
    parts: list[np.ndarray] = []
    n, block = 0, _BLOCK // sound.channels
    while n <= most:
        part = sound.read(min(block, most + 1 - n), dtype="float32", always_2d=True)
        if not len(part):
            break
        parts.append(part.mean(axis=1))
        n += len(part)
    if n > most:
        length = f" ({sound.frames / rate:.1f} s)" if sound.frames < _UNKNOWN else ""
        raise BadRow(f"{path}: longer{length} than {max_seconds:g} s")
    cut = [tuple(map(int, sizes)) for sizes in _CUT.findall(sound.extra_info)]
    if n < sound.frames < _UNKNOWN or any(there < said < _UNKNOWN for said, there in cut):
        raise BadRow(f"{path}: truncated: only {n / rate:.2f} s can be read")
    if not n:
        raise BadRow(f"{path}: no samples")
    samples = np.concatenate(parts)
    if not np.isfinite(samples).all():
        raise BadRow(f"{path}: some samples are not finite")
    if rate == SAMPLE_RATE:
        return samples
    divisor = math.gcd(rate, SAMPLE_RATE)
    return resample_poly(samples, SAMPLE_RATE // divisor, rate // divisor).astype(np.float32)
