import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from lm.config import default
from lm.data.audio.waveform import read_waveform
from lm.data.record_store import build_record_store
from lm.data.records import open_records
from lm.data.special_tokens import SpecialTokens
from lm.data.tokenizers.basic import ByteTokenizer
from lm.errors import UserError
from lm.objectives.transcription import Transcription

S, T, M = 50, 16, 80
BOS, EOS = 1, 2
SPECIAL = SpecialTokens(0, BOS, EOS, 0, 0, 0, vocab_size=256)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def store(spoken_file, tmp_path_factory):
    data = default().data
    data.sequence_length = S
    records = open_records(f"audio:{spoken_file}", data, columns=("audio", "target"))
    return build_record_store(records, ByteTokenizer(), tmp_path_factory.mktemp("cache"))


def test_row_has_whisper_features_and_transcript(store, spoken_file):
    objective = Transcription(S, T, SPECIAL, prefix=(7, 8), masks=3)
    record = store[1]
    row = objective.features(objective.examples(store, training=False)[1], RNG)
    assert {name: (x.shape, x.dtype.name) for name, x in row.items()} == objective.shapes
    samples = read_waveform(spoken_file.parent / record.raw["audio"], 1)
    theirs = WhisperFeatureExtractor(chunk_length=1)(samples, sampling_rate=16_000)
    assert np.abs(row["source"] - theirs["input_features"][0].T).max() < 5e-3
    assert (row["source_segments"] == 1).all()  # it attends to the silence too
    assert row["source_positions"].tolist() == [*range(S)]
    text = list(record.raw["target"].encode())
    n = len(text) + 3
    assert row["inputs"][:n].tolist() == [BOS, 7, 8, *text]
    assert row["targets"][:n].tolist() == [7, 8, *text, EOS]
    assert row["weights"].tolist() == [0, 0] + [1] * (n - 2) + [0] * (T - n)
    assert row["target_segments"].tolist() == [1] * n + [0] * (T - n)
    short = Transcription(S, 4, SPECIAL).pair(record)[2]
    assert short.tolist() == [*text[:3], EOS]
    whole = np.asarray(objective.source(record))
    assert np.array_equal(whole, row["source"])
    assert len(objective.source(record)) == len(whole) == 2 * S


def test_masks_hide_stretches_of_time_and_bands(store):
    objective = Transcription(S, T, SPECIAL, masks=1, mask_frames=5, mask_bins=9)
    example = objective.examples(store, training=True)[1]
    n_heard = len(store[1].features["audio"])
    whole = np.asarray(objective.source(store[1]))
    hidden = []
    for seed in range(40):
        source = objective.features(example, np.random.default_rng(seed))["source"]
        same = (source == whole) | (source != 0)
        assert (source[same] == whole[same]).all()
        times, bands = ((source == 0).all(axis) for axis in (1, 0))
        assert not times[n_heard:].any()
        assert (source == 0).sum() == S * 2 * bands.sum() + times.sum() * (M - bands.sum())
        hidden.append((times.sum(), bands.sum()))
        again = objective.features(example, np.random.default_rng(seed))["source"]
        assert np.array_equal(source, again)
    assert np.max(hidden, 0).tolist() == [5, 9]
    assert np.min(hidden, 0).tolist() == [0, 0]


def test_model_and_data_agree_on_the_bins():
    config = default()
    config.objective.name, config.model.family = "transcription", "encoder_decoder"
    config.model.n_mels, config.data.n_mels = 80, 128
    message = r"reads --config\.data\.n_mels=128 mel bins: --config\.model\.n_mels=80 must"
    with pytest.raises(UserError, match=message):
        Transcription.from_config(config, None)
