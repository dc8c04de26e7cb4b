import contextlib
import io
import math
import re
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.audio.waveform import read_waveform
from lm.data.records import BadRow

LOSSY = {"VORBIS", "OPUS", "MPEG_LAYER_III", "ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM", "GSM610"}
# libsndfile names these, but soundfile cannot read or write them.
NOT_HANDLED = re.compile("G721|NMS|DWVW|MPEG_LAYER_II?$|WAV MPEG")
FORMATS = [
    (container, subtype)
    for container in ("WAV", "FLAC", "OGG", "AIFF", "MP3")
    for subtype in soundfile.available_subtypes(container)
    if not NOT_HANDLED.search(f"{container} {subtype}")
]


def tone(rate: int, seconds: float = 0.5, channels: int = 1) -> np.ndarray:
    """Return 440 Hz, in two channels of different strength."""
    wave = np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
    return np.stack([wave * (0.2 + 0.2 * (i % 2)) for i in range(channels)], 1)


def written(samples: np.ndarray, rate: int, container="WAV", subtype="FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(("container", "subtype"), FORMATS)
def test_every_format_is_read(container, subtype, tmp_path):
    path, rate = tmp_path / "a", 48_000 if subtype == "OPUS" else 8_000
    path.write_bytes(written(tone(rate), rate, container, subtype))
    found = read_waveform(path, 1.0)
    assert found.dtype == np.float32
    if subtype in LOSSY:
        assert abs(len(found) - 8000) < 1500  # whole blocks
        assert 0.1 < np.abs(found).max() < 0.3
    else:
        expected = tone(16_000)[:, 0]
        assert len(found) == len(expected)
        tolerance = 0.02 if "8" in subtype else 2e-3
        assert np.abs(found - expected)[400:-400].max() < tolerance


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 44_101, 48_000, 192_000]),
    st.integers(1, 6),
)
def test_any_rate_and_channels_become_mono_at_16_khz(tmp_path_factory, rate, channels):
    path = tmp_path_factory.mktemp("a") / "a.wav"
    path.write_bytes(written(tone(rate, 0.1, channels), rate))
    found = read_waveform(path, 0.1)
    strength = tone(16_000, 0.1, channels).mean(1)
    assert len(found) == math.ceil(round(0.1 * rate) * 16_000 / rate)
    n = min(len(found), len(strength))
    assert np.abs(found[:n] - strength[:n])[200:-200].max() < 2e-3


WHOLE = {
    name: written(tone(16_000, 0.1), 16_000, *name.split())
    for name in ("WAV PCM_16", "WAV FLOAT", "FLAC PCM_16", "OGG VORBIS", "AIFF PCM_16")
}


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(WHOLE)), st.floats(0, 1, exclude_max=True))
def test_truncated_file_is_rejected(tmp_path_factory, name, part):
    path = tmp_path_factory.mktemp("a") / "a"
    path.write_bytes(WHOLE[name][: int(part * len(WHOLE[name]))])
    with pytest.raises(BadRow, match=f"^{path}: (truncated|not? |longer)"):
        read_waveform(path, 10)


HEADERS = st.sampled_from([content[:40] for content in WHOLE.values()])


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=400) | st.tuples(HEADERS, st.binary(max_size=200)).map(b"".join))
def test_any_bytes_are_read_or_rejected(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("a") / "a"
    path.write_bytes(content)
    with contextlib.suppress(BadRow):
        assert np.isfinite(read_waveform(path, 10)).all()


def test_non_recording_is_rejected(tmp_path):
    path = tmp_path / "a.wav"

    def problem(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(BadRow) as error:
            read_waveform(path, 0.05)
        return str(error.value).removeprefix(f"{path}: ")

    assert problem(written(np.zeros((0, 1)), 16_000)) == "no samples"
    assert problem(written(tone(16_000, 0.1), 16_000)) == "longer (0.1 s) than 0.05 s"
    assert problem(written(np.full(8, np.nan), 16_000)) == "some samples are not finite"
    assert problem(written(tone(500), 500)) == "500 samples per second, not 1000 to 768000"
    assert problem(b"one,two\n").startswith("not a recording, or damaged (")
    path.write_bytes(written(tone(16_000, 1.0), 16_000, "MP3", "MPEG_LAYER_III")[:1800])
    with pytest.raises(BadRow, match=r": truncated: only 0\.\d+ s can be read"):
        read_waveform(path, 1.0)
    with pytest.raises(BadRow, match=f"^no file {tmp_path}/b$"):
        read_waveform(tmp_path / "b", 1)
    with pytest.raises(BadRow, match=f"^no file {tmp_path}$"):
        read_waveform(tmp_path, 1)


def test_stream_of_unknown_length_is_read_whole(tmp_path):
    """Programs that write into a pipe leave the sizes in the header at their maximum."""
    content = bytearray(WHOLE["WAV PCM_16"])
    at = content.index(b"data") + 4
    content[4:8] = content[at : at + 4] = struct.pack("<I", 2**32 - 1)
    (tmp_path / "a").write_bytes(content)
    assert len(read_waveform(tmp_path / "a", 1)) == 1600
