import json

import pytest

from lm.decoding import batch
from lm.decoding.generate_file import generate_file
from lm.decoding.sampling import Sampling

TEXTS = ["abc", "e", "ddab", "", "edcba", "bb", "ace"]
MADE_BY = {"step": 7}
WAYS = {
    "sources": ("encoder_decoder", None, 1, "txt"),
    "sources, n-best": ("encoder_decoder", None, 2, "jsonl"),
    "prompts": ("decoder", None, 1, "txt"),
    "prompts, sampled": ("decoder", Sampling(), 1, "jsonl"),
}


@pytest.fixture(params=WAYS)
def way(request, make_experiment, monkeypatch, tmp_path):
    """A function that writes the outputs, and where they are; in batches of 2, windows of 4."""
    family, sampling, n_best, suffix = WAYS[request.param]
    monkeypatch.setattr(batch, "_BATCHES_SORTED", 2)
    made = make_experiment(family, decode__batch_size=2, decode__beam_size=n_best)
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    output = tmp_path / f"out.{suffix}"
    return lambda: generate_file(
        *made, tmp_path / "in.txt", output, sampling, 5, n_best, MADE_BY
    ), output


def test_second_start_gives_the_identical_file(way, monkeypatch, capsys):
    run, output = way
    monkeypatch.setattr("lm.progress._SECONDS_A_LINE", 0.0)
    run()
    whole = output.read_bytes()
    assert whole.count(b"\n") == len(TEXTS)
    assert len(set(whole.splitlines())) > 3
    for size in (0, 3, len(whole) // 2, len(whole) - 4, len(whole) - 1):
        output.write_bytes(whole[:size])
        run()
        assert output.read_bytes() == whole
        assert f"generating: {len(TEXTS)} of {len(TEXTS)} (100 %)" in capsys.readouterr().err


def test_existing_files_are_not_rebuilt(way, monkeypatch):
    run, output = way
    run()
    whole = output.read_bytes()
    for name in ("_search", "sample_steps"):
        monkeypatch.setattr(batch, name, None)
    run()
    assert output.read_bytes() == whole


@pytest.mark.parametrize("way", ["sources, n-best", "prompts, sampled"], indirect=True)
def test_objects_name_what_they_are_made_of(way):
    run, output = way
    run()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    role = "source" if "source" in rows[0] else "prompt"
    assert [row[role] for row in rows] == TEXTS
    for row in rows:
        if role == "prompt":
            assert sorted(row) == ["prompt", "text"]
        else:
            best, second = row["hypotheses"]
            assert best == {"text": row["text"], "score": row["score"]}
            assert second["score"] < best["score"]
