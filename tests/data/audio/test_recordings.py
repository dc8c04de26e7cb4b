import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
from tests.data.audio.conftest import TEXTS, sine

from lm.data import record_store
from lm.data.audio.log_mel import log_mel
from lm.data.audio.waveform import read_waveform
from lm.data.record_store import build_record_store
from lm.data.records import open_records
from lm.data.tokenizers.basic import ByteTokenizer
from lm.errors import UserError

COLUMNS = ("audio", "target")


@pytest.fixture
def make_store(make_data, tmp_path):
    def make(source="audio:spoken/a.jsonl", **changes):
        data = make_data(**({"sequence_length": 25, "workers": 2} | changes))
        records = open_records(source, data, "train", COLUMNS)
        return build_record_store(records, ByteTokenizer(), tmp_path / "cache", workers=2)

    return make


def test_store_holds_features_and_tokens(spoken, make_store):
    store = make_store()
    assert [record.raw["target"] for record in store] == TEXTS
    for record in store:
        expected = log_mel(read_waveform(spoken / record.raw["audio"], 1), 80, 50)
        assert record.features["audio"].dtype == np.float16
        assert np.abs(record.features["audio"] - expected).max() < 1e-3
        assert bytes(record.tokens["target"].tolist()).decode() == record.raw["target"]
    assert store.lengths("audio").tolist() == [12, 22, 32, 42]
    assert store.select(np.array([2]))[0].raw["target"] == TEXTS[2]
    assert store.manifest.features == {"audio": 80}
    assert make_store(n_mels=128)[0].features["audio"].shape == (12, 128)


def test_processes_encode_many_recordings(spoken, make_store, monkeypatch, tmp_path):
    expected = make_store()
    with open(spoken / "a.jsonl", "a") as file:
        file.write('\n{"audio": "0.wav", "target": "x"}\n{"audio": "missing.wav", "target": "y"}')
    monkeypatch.setattr(record_store, "_FEW", 2)
    found = make_store(bad_rows="skip")
    assert found.manifest.n_skipped == 1
    assert found.manifest.first_skipped == f"{spoken}/a.jsonl:6: no file {spoken}/missing.wav"
    for index, record in enumerate(expected):
        assert np.array_equal(found[index].features["audio"], record.features["audio"])


def test_forms_of_a_source(spoken, make_store, tmp_path):
    def texts(source, **changes):
        return [(r.raw["target"], len(r.features["audio"])) for r in make_store(source, **changes)]

    expected = texts("audio:spoken/a.jsonl")
    rows = [json.loads(line) for line in (spoken / "a.jsonl").read_text().splitlines()]
    folder = spoken / "metadata"
    shutil.copytree(spoken, folder / "train")
    (folder / "train/a.jsonl").unlink()
    lines = [f"train/{row['audio']},{row['target']}" for row in rows]
    (folder / "metadata.csv").write_text("\n".join(["file_name,transcription", *lines]))
    assert texts("audio:spoken/metadata") == expected
    for name, column in (("text", "text"), ("transcript", "target=transcript")):
        nemo = [{"audio_filepath": r["audio"], "duration": 1, name: r["target"]} for r in rows]
        (spoken / "nemo.json").write_text("\n".join(map(json.dumps, nemo)))
        columns = column if "=" in column else ""
        assert texts("audio:spoken/nemo.json", columns=columns) == expected
    (spoken / "a.tsv").write_text("\n".join(f"{r['target']}\t0\t{r['audio']}" for r in rows))
    by_index = {"columns": "target=0,audio=2", "header": False}
    assert texts("audio:spoken/a.tsv", **by_index) == expected
    absolute = [json.dumps(row | {"audio": str(spoken / row["audio"])}) for row in rows]
    (tmp_path / "b.jsonl").write_text("\n".join(absolute))
    nested = [json.dumps(row | {"audio": {"path": row["audio"], "bytes": None}}) for row in rows]
    (spoken / "nested.jsonl").write_text("\n".join(nested))
    assert texts("audio:spoken/nested.jsonl") == expected
    assert texts("audio:b.jsonl") == texts("jsonl:b.jsonl") == expected
    for chapter, ids in (("1/2", (0, 1)), ("1/3", (2, 3))):
        place = tmp_path / "libri" / chapter
        place.mkdir(parents=True)
        name = chapter.replace("/", "-")
        for i in ids:
            samples, rate = soundfile.read(spoken / rows[i]["audio"])
            soundfile.write(place / f"{name}-{i}.flac", samples, rate)
        lines = [f"{name}-{i} {TEXTS[i]}" for i in ids]
        (place / f"{name}.trans.txt").write_text("\n".join(lines))
    assert texts("audio:libri") == expected


def test_store_depends_on_the_contents_of_recordings(spoken, make_data, make_store):
    def digest(**changes):
        data = make_data(sequence_length=25, **changes)
        return open_records("audio:spoken/a.jsonl", data, "train", COLUMNS).digest

    first, store = digest(), make_store()
    assert digest() == first
    assert make_store().directory == store.directory
    soundfile.write(spoken / "0.wav", sine(900, 0.1), 16_000)
    assert digest() != first
    changed = make_store()
    assert changed.directory != store.directory
    assert not np.array_equal(changed[0].features["audio"], store[0].features["audio"])
    (changed.directory / "audio.bin").write_bytes(b"")
    assert len(make_store()[0].features["audio"]) == 12
    assert make_store(sequence_length=24).directory != changed.directory


def test_rows_that_cannot_be_used_are_named(spoken, make_store, capsys):
    manifest, rows = spoken / "b.jsonl", []

    def problem(**changes):
        manifest.write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(UserError) as error:
            make_store("audio:spoken/b.jsonl", **changes)
        return str(error.value).replace(str(spoken), "")

    bad = {
        "no file /no.wav": {"audio": "no.wav", "target": "x"},
        "/a.jsonl: not a recording, or damaged (": {"audio": "a.jsonl", "target": "x"},
        "/3.flac: longer (0.4 s) than 0.38 s": {"audio": "3.flac", "target": "x"},
        "'target' is empty": {"audio": "0.wav", "target": " "},
        "'target' is of type int, not a string": {"audio": "0.wav", "target": 3},
        "'audio' is of type dict, not a string": {"audio": {}, "target": "x"},
        "'audio' is of type NoneType, not a string": {"audio": None, "target": "x"},
        r"'/a\x00b' is not a file name": {"audio": "/a\0b", "target": "x"},
        "no column 'target' (available: audio)": {"audio": "0.wav"},
    }
    for expected, row in bad.items():
        rows[:] = [{"audio": "0.wav", "target": "x"}, row]
        assert problem(sequence_length=19).startswith(f"/b.jsonl:2: {expected}"), expected
    rows[:] = [*bad.values()]
    assert problem(bad_rows="skip", sequence_length=19).startswith(
        "audio:spoken/b.jsonl has no usable record; the first: /b.jsonl:"
    )
    rows[:] = [{"audio": "0.wav"}]
    assert "no column 'target' (available: audio): set --config.data.columns=target=N" in problem()
    rows[:] = [{"audio": "0.wav", "target": "x"}, *bad.values()]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    assert len(make_store("audio:spoken/b.jsonl", bad_rows="skip", sequence_length=19)) == 1
    assert "skipped 9 of 10 rows" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no file matches 'spoken/c\.jsonl'"):
        make_store("audio:spoken/c.jsonl")
    (spoken / "empty").mkdir()
    with pytest.raises(UserError, match=r"the folder has neither metadata\.csv, .* nor recordings"):
        make_store("audio:spoken/empty")


def test_tables_may_hold_the_recordings(spoken, make_store, make_data, tmp_path, monkeypatch):
    """As `datasets.Audio` writes them: bytes, or the path of a file."""
    rows = [json.loads(line) for line in (spoken / "a.jsonl").read_text().splitlines()]
    contents = [(spoken / row["audio"]).read_bytes() for row in rows]
    heard = [{"bytes": content, "path": None} for content in contents]
    heard[1]["path"] = "a/é.flac"
    expected = make_store()

    def write(heard, **columns):
        table = pyarrow.table({"audio": heard} | columns)
        pyarrow.parquet.write_table(table, tmp_path / "t.parquet")

    monkeypatch.setattr(record_store, "_FEW", 2)
    texts = [row["target"] for row in rows]
    for name in ("text", "sentence"):
        write(heard, **{name: texts})
        columns = "target=sentence" if name == "sentence" else ""
        found = make_store("parquet:t.parquet", columns=columns)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a.features["audio"], b.features["audio"])
            assert a.raw["target"] == b.raw["target"]
    with pytest.raises(UserError, match=r"no column 'target' \(available: audio, sentence\): set"):
        make_store("parquet:t.parquet")
    names = [record.raw["audio"] for record in found]
    assert names[:2] == [f"{tmp_path}/t.parquet: row 1", "a/é.flac"]
    digest = open_records("parquet:t.parquet", make_data(), "train", COLUMNS).digest
    heard[2]["bytes"] = contents[0]
    write(heard, sentence=texts)
    assert open_records("parquet:t.parquet", make_data(), "train", COLUMNS).digest != digest
    paths = [{"bytes": None, "path": str(spoken / row["audio"])} for row in rows]
    write(paths, text=texts)
    assert len(make_store("parquet:t.parquet")) == 4
    write(contents, text=texts)
    assert [len(record.features["audio"]) for record in make_store("parquet:t.parquet")] == [
        len(record.features["audio"]) for record in expected
    ]
    heard[0] = {"bytes": b"RIFF", "path": "x.wav"}
    heard[3] = None
    write(heard, text=texts)
    found = make_store("parquet:t.parquet", bad_rows="skip")
    assert found.manifest.n_skipped == 2
    heard[3] = heard[2]
    write(heard, text=texts)
    with pytest.raises(UserError, match=r"t\.parquet: row 1: x\.wav: not a recording, or damaged"):
        make_store("parquet:t.parquet")
