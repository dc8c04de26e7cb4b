"""A run of transcription is trained, measured and transcribes recordings, on the command line."""

from __future__ import annotations

import json

import pytest
import soundfile

from lm.cli import main
from lm.training.trainer import train

STEPS = 400


@pytest.fixture
def run(make_kind, tmp_path, one_device):
    """Workdir of a run that knows its recordings by heart."""
    changes = {"model.dropout": 0.0, "model.attention_dropout": 0.0, "objective.masks": 0}
    kind = "transcription encoder_decoder"
    config = make_kind(kind, **changes, train__steps=STEPS, model__d_model=32)
    config.train.steps_per_dispatch = 20
    assert train(config, tmp_path / "run")
    return tmp_path / "run"


def test_run_transcribes_what_it_was_trained_on(run, spoken_file, tmp_path, capsys):
    def lm(*words, code=0):
        assert main([*words, "--workdir", str(run)]) == code
        return capsys.readouterr()

    def texts(source):
        output = tmp_path / "out.jsonl"
        for file in tmp_path.glob("out.jsonl*"):
            file.unlink()
        lm("generate", "--input", str(source), "--output", str(output))
        return [json.loads(line) for line in output.read_text().splitlines()]

    rows = [json.loads(line) for line in spoken_file.read_text().splitlines()]
    report = json.loads(lm("eval", "--task", "--json").out)
    assert report["n"] == len(rows)
    assert (report["wer"], report["cer"]) == (0, 0)
    found = texts(spoken_file)
    assert [row["text"] for row in found] == [row["target"] for row in rows]
    folder = spoken_file.parent
    assert [row["audio"] for row in found] == [str(folder / row["audio"]) for row in rows]
    by_name = {row["audio"]: row["text"] for row in found}
    several = texts(folder / "1*.wav")
    assert len(several) == 11
    assert all(row["text"] == by_name[row["audio"]] for row in several)
    (made,) = json.loads(lm("generate", "--prompt", str(folder / "5.wav"), "--json").out)
    assert (made["audio"], made["text"]) == (str(folder / "5.wav"), rows[5]["target"])
    # Wrong inputs and verbs that read texts: one line.
    soundfile.write(tmp_path / "long.wav", [0.0] * 5200, 16_000)
    for words, expected in {
        ("generate", "--prompt", str(tmp_path / "no.wav")): f"no file {tmp_path}/no.wav",
        ("generate", "--prompt", str(tmp_path / "long.wav")): "longer (0.3 s) than 0.32 s",
        ("inspect", "--prompt", "one"): "lm inspect needs text, but this model takes recordings",
        ("serve",): "lm serve needs text, but this model takes recordings",
    }.items():
        error = lm(*words, code=2).err
        assert expected in error, words
        assert error.strip().splitlines()[-1].startswith("error: ")
    (tmp_path / "q.jsonl").write_text('{"prompt": "one", "continuations": [" two"]}\n')
    assert "lm score needs text" in lm("score", "--input", str(tmp_path / "q.jsonl"), code=2).err
