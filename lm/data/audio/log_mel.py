"""Log-mel features of a recording, as in Whisper (Radford et al. 2022, section 2.2).

Equal to the numpy implementation of transformers' `WhisperFeatureExtractor`: Slaney's mel scale,
Hann windows of 25 ms every 10 ms, and values at most 8 decades below the loudest.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

SAMPLE_RATE = 16_000  # Hz
HOP = 160  # samples from one frame to the next: 10 ms
WINDOW = 400  # samples per frame: 25 ms
FRAMES_PER_POSITION = 2  # the encoder's second convolution has stride 2

_SILENCE = 1e-10  # lowest power
_RANGE = 8.0  # decades
_BREAK = 1000.0  # Hz; mels are logarithmic above


def log_mel(samples: np.ndarray, n_mels: int, n_frames: int) -> np.ndarray:
    """Return the features of a recording without those of its padding.

    Args:
        samples: [n], at 16 kHz, in [-1, 1].
        n_mels: mel bins, M.
        n_frames: length to which the recording is padded or cut, which `pad_frames` restores.

    Returns:
        float32 [F, M], only the F frames that overlap a sample, at most `n_frames`.
    """
    n_used = min(n_frames, -(-len(samples) // HOP) + 3)  # further frames contain no sample
    padded = np.zeros(n_used * HOP)
    padded[: len(samples)] = samples[: len(padded)]
    padded = np.pad(padded, WINDOW // 2, mode="reflect")
    windows = sliding_window_view(padded, WINDOW)[::HOP][:n_used]
    power = np.abs(np.fft.rfft(windows * np.hanning(WINDOW + 1)[:-1])) ** 2
    decades = np.log10(np.maximum(power @ mel_filters(n_mels), _SILENCE))
    decades = np.maximum(decades, decades.max() - _RANGE)
    n_heard = -(-(len(samples) + WINDOW // 2) // HOP)
    return ((decades + 4) / 4).astype(np.float32)[:n_heard]


def pad_frames(features: np.ndarray, n_frames: int) -> np.ndarray:
    """Pad features with those of silence, as in a recording of full length.

    Args:
        features: [F, M] from `log_mel`.
        n_frames: number of frames of the result.

    Returns:
        float32 [n_frames, M].
    """
    silence = max((np.log10(_SILENCE) + 4) / 4, float(features.max()) - _RANGE / 4)
    padded = np.full((n_frames, features.shape[1]), silence, np.float32)
    padded[: len(features)] = features[:n_frames]
    return padded


@lru_cache
def mel_filters(n_mels: int) -> np.ndarray:
    """Return the triangular filters of Slaney's Auditory Toolbox, each of area 1, [201, n_mels]."""
    top = SAMPLE_RATE / 2
    corners = _to_hertz(np.linspace(0, _to_mel(top), n_mels + 2))
    low, middle, high = corners[:-2], corners[1:-1], corners[2:]
    f = np.linspace(0, top, WINDOW // 2 + 1)[:, None]
    rising, falling = (f - low) / (middle - low), (high - f) / (high - middle)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)


def _to_mel(hertz: float) -> float:
    """Convert a frequency above 1 kHz to mels."""
    return 15 + 27 * np.log(hertz / _BREAK) / np.log(6.4)


def _to_hertz(mels: np.ndarray) -> np.ndarray:
    return np.where(mels < 15, mels * 200 / 3, _BREAK * np.exp(np.log(6.4) * (mels - 15) / 27))
