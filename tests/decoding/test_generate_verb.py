"""`lm generate` from the command line, on a run of an encoder–decoder."""

import json

import jax
import pytest
from runs import random_run

from lm.api import generate, load_run
from lm.cli import main
from lm.data.tokenizers.basic import ByteTokenizer
from lm.errors import UserError

CONFIG = """
from lm.config import default

def get_config():
    config = default()
    config.model.family, config.objective.name = "encoder_decoder", "seq2seq"
    config.model.n_layers, config.model.d_model, config.model.n_heads = 1, 16, 2
    config.model.max_length = 16
    config.data.source = "tsv:{folder}/pairs.tsv"
    config.data.validation_source = config.data.source
    config.data.sequence_length, config.data.batch_size = 12, 4
    config.train.steps = 1
    config.log.tensorboard = False
    return config
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return what `lm generate` on the run prints, or its error."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: first)
    pairs = "".join(f"{'ab' * n}\t{'ba' * n}\n" for n in (1, 2, 3, 2, 1, 3))
    (tmp_path / "pairs.tsv").write_text("source\ttarget\n" + pairs)
    (tmp_path / "config.py").write_text(CONFIG.format(folder=tmp_path))
    workdir = str(tmp_path / "run")
    assert main(["train", "--config", str(tmp_path / "config.py"), "--workdir", workdir]) == 0
    capsys.readouterr()

    def generate(*words):
        code = main(["generate", "--workdir", workdir, "--max_new_tokens", "4", *map(str, words)])
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.err.splitlines()[-1]

    return generate


def test_sources_become_targets(run, tmp_path):
    (made,) = json.loads(run("--prompt", "abab", "--json"))
    assert made["source"] == "abab"
    assert run("--prompt", "abab") == made["text"] + "\n"

    (tmp_path / "in.jsonl").write_text('{"source": "abab"}\n{"source": "b"}\n')
    files = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]
    assert run(*files) == ""
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows[0] == {key: pytest.approx(value) for key, value in made.items()}
    assert [row["source"] for row in rows] == ["abab", "b"]

    assert "different settings (beam_size: 1 → 2)" in run(*files, "--config.decode.beam_size=2")
    (tmp_path / "out.jsonl").unlink()
    run(*files, "--config.decode.beam_size=2", "--n_best", 2, "--config.decode.banned=ab")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(len(row["hypotheses"]) == 2 for row in rows)


def test_misuse_is_a_one_line_error(run, tmp_path):
    assert "--input and --output must be given together" in run("--input", "x")
    files = ["--input", tmp_path / "none", "--output", tmp_path / "out"]
    assert "no file" in run(*files)
    assert "cannot be combined with --prompt" in run(*files, "--prompt", "x")
    assert "--n_best needs --json" in run(*files, "--n_best", 2)
    assert "--n_best 2 needs --config.decode.beam_size=2" in run("--json", "--n_best", 2)
    assert "min_length=5 is above --config.decode.max_length=4" in run(
        "--config.decode.min_length=5"
    )


@pytest.mark.parametrize("family", ["lstm", "decoder"])
def test_classifier_does_not_generate_text(tmp_path, capsys, family):
    values = {"model.family": family, "model.bidirectional": family == "lstm"}
    values |= {"objective.name": "classification", "data.labels": "a,b"}
    values |= {"model.tie_embeddings": False, "model.vocab_size": 0}
    run = random_run(tmp_path / "run", values, ByteTokenizer())
    expected = f"a model of family {family} trained by classification does not generate text"
    assert main(["generate", "--workdir", str(run), "--prompt", "ab"]) == 2
    assert capsys.readouterr().err == f"error: {expected}\n"
    with pytest.raises(UserError, match=expected):
        generate(load_run(run), "ab")
    with pytest.raises(UserError, match="a chat needs a decoder"):
        load_run(run).chat("ab")
