import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from lm.data.audio.log_mel import log_mel, mel_filters, pad_frames

RNG = np.random.default_rng(0)
RECORDINGS = {
    "tone": 0.3 * np.sin(2 * np.pi * 440 * np.arange(12_345) / 16_000),
    "noise up to the end": RNG.normal(0, 0.1, 32_000),
    "one sample": np.ones(1),
    "silence": np.zeros(4_000),
    "last sample": np.eye(1, 31_999, 31_998)[0],
    "too long": RNG.normal(0, 0.01, 40_000),
    "loud, then quiet": np.concatenate([RNG.normal(0, 1, 9_000), RNG.normal(0, 1e-4, 9_000)]),
}


@pytest.mark.parametrize("n_mels", [80, 128])
def test_features_match_whisper(n_mels):
    theirs = WhisperFeatureExtractor(feature_size=n_mels, chunk_length=2)
    assert np.abs(mel_filters(n_mels) - theirs.mel_filters).max() < 1e-12
    for name, samples in RECORDINGS.items():
        found = log_mel(samples.astype(np.float32), n_mels, 200)
        whole = np.zeros((1, 32_000), np.float32)
        whole[0, : len(samples)] = samples[:32_000]
        expected = theirs._np_extract_fbank_features(whole, "cpu")[0].T
        assert found.dtype == np.float32, name
        assert len(found) == min(200, -(-(len(samples) + 200) // 160)), name
        assert np.abs(pad_frames(found, 200) - expected).max() < 1e-5, name
        again = theirs(samples, sampling_rate=16_000)["input_features"][0].T  # torch's float32
        assert np.abs(pad_frames(found, 200) - again).max() < 5e-3, name


def test_whisper_of_thirty_seconds():
    samples = RNG.normal(0, 0.1, 470_000).astype(np.float32)
    found = pad_frames(log_mel(samples, 80, 3000), 3000)
    expected = WhisperFeatureExtractor()(samples, sampling_rate=16_000)["input_features"][0].T
    assert np.abs(found - expected).max() < 1e-4
