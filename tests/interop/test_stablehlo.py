"""`lm export --format stablehlo`: exported programs give the same results without `lm`."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from runs import random_run

from lm.cli import main
from lm.data.tokenizers.basic import ByteTokenizer
from lm.decoding.batch import decode_best
from lm.decoding.beam import BeamOptions
from lm.errors import UserError
from lm.interop.run_exported import Exported
from lm.interop.stablehlo import Sizes, export_programs
from lm.runs.saved_params import restore_run

TOKENS = ByteTokenizer()
ROWS = [[256, 84, 104, 101], [256, 65, 32, 99, 97, 116]]
SIZES = {"model.vocab_size": 260, "data.sequence_length": 20, "decode.max_length": 8}
SIZES["model.n_layers"] = 1
ROTARY = {"model.positions": "rotary", "model.norm": "rmsnorm", "model.activation": "swiglu"}
SEQ2SEQ = {"objective.name": "span_corruption", "model.family": "encoder_decoder"}
RUNS = {  # configuration, and options of the export
    "int8": (
        ROTARY | {"model.n_kv_heads": 1, "model.window": 4},
        ["--config.decode.weights=int8"],
    ),
    "prefix": ({"objective.name": "prefix"}, ["--batch", "3", "--length", "7"]),
    "experts": (
        SEQ2SEQ | {"model.positions": "relative", "model.n_experts": 3, "model.experts_every": 1},
        [],
    ),
    "recurrent": ({"model.family": "lstm"}, ["--context", "14"]),
}
# Blocks lm, reads [[folder, program, rows], …] and prints the outputs.
WITHOUT_LM = """
import importlib.util, json, sys
sys.modules["lm"] = None
for folder, program, rows in json.load(sys.stdin):
    spec = importlib.util.spec_from_file_location("run", f"{folder}/run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    model = run.Exported(folder)
    if program == "generate":
        print(json.dumps(model.generate(rows, 8)))
    else:
        found = model.call(program, **model.batch(rows))
        print(json.dumps({name: x.tolist() for name, x in found.items()}))
"""


def export(run, *words) -> None:
    to = run.parent / f"{run.name}-exported"
    words = ["export", "--workdir", run, "--to", to, "--format", "stablehlo", *words]
    assert main([str(word) for word in words]) == 0
    return to


def without_lm(*jobs):
    """Return the outputs of exported folders, run in a process without lm."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LM],
        input=json.dumps([[str(folder), *job] for folder, *job in jobs]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def greedy(run, weights) -> list[list[int]]:
    """What `lm generate --greedy` writes after `ROWS`."""
    overrides = {"decode.weights": weights, "decode.beam_size": "1"}
    experiment, params, _ = restore_run(run, overrides, pytest.fail, any_batch=True)
    options = BeamOptions.from_config(experiment.config, TOKENS)
    return decode_best(experiment, params, TOKENS, ROWS, options)


def test_greedy_tokens_match_lm(tmp_path, one_device):
    """Rows of different lengths, in one batch; the sizes symbolic or given."""
    jobs, expected = [], []
    for name, (values, words) in RUNS.items():
        run = random_run(tmp_path / name, SIZES | values, TOKENS)
        jobs.append((export(run, "--platforms", "cpu", *words), "generate", ROWS))
        expected.append(greedy(run, "int8" if name == "int8" else "auto"))
    assert without_lm(*jobs) == expected


def test_programs_of_encoders(tmp_path, one_device):
    values = {"model.family": "encoder", "objective.name": "classification", "data.labels": "a,b,c"}
    run = random_run(tmp_path / "classifier", SIZES | values, TOKENS)
    folder = export(run)
    about = json.loads((folder / "manifest.json").read_text())
    assert (about["labels"], about["platforms"]) == (["a", "b", "c"], ["cpu", "tpu", "cuda"])
    assert about["programs"]["predict"]["outputs"] == [["scores", "float32", "batch", 3]]
    scores, encoded = without_lm((folder, "predict", ROWS), (folder, "encode", ROWS))
    experiment, params, _ = restore_run(run, {}, pytest.fail, any_batch=True)
    tokens, segments = (Exported(folder).batch(ROWS)[name] for name in ("tokens", "segments"))
    model = experiment.model.bind({"params": params})
    hidden = model.hidden(tokens, None, segments, np.zeros_like(tokens))
    np.testing.assert_allclose(encoded["hidden"][0][:4], hidden[0, :4], atol=1e-5)
    np.testing.assert_allclose(encoded["mean"][1], hidden[1].mean(0), atol=1e-5)
    batch = {"inputs": tokens, "segment_ids": segments, "token_types": np.zeros_like(tokens)}
    found = experiment.objective.predict(model, batch)
    np.testing.assert_allclose(scores["scores"], found, atol=1e-5)


def test_every_exported_program_is_lowered_for_all_platforms_on_one_device(tmp_path, one_device):
    folder = export(random_run(tmp_path / "run", SIZES, TOKENS))
    for name in ("prefill", "decode"):
        found = jax.export.deserialize(bytearray((folder / f"{name}.jax_export").read_bytes()))
        assert (found.platforms, found.nr_devices) == (("cpu", "tpu", "cuda"), 1)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--platforms", "cpu,gpu"], "unknown platform 'gpu'"),
        (["--context", "99"], "the model has positions for 20 tokens"),
        (["--length", "21"], "--length 21 is more than the context of 20 tokens"),
        (["--format", "huggingface", "--batch", "2"], "--batch is an option of --format stablehlo"),
        (["--dtype", "q8_0"], "q8_0 is a type of --format gguf"),
    ],
)
def test_invalid_input_is_rejected(words, problem, tmp_path, capsys, one_device):
    run = random_run(tmp_path / "run", SIZES | {"model.max_length": 20}, TOKENS)
    base = ["export", "--workdir", str(run), "--to", str(tmp_path / "to"), "--format", "stablehlo"]
    assert main([*base, *words]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_model_that_neither_generates_nor_encodes(tmp_path, one_device):
    values = {
        "objective.name": "skip_gram",
        "model.family": "skip_gram",
        "objective.subsample": 0.0,
    }
    run = random_run(tmp_path / "run", SIZES | values, None)
    with pytest.raises(UserError, match="no program to export"):
        export_programs(run, tmp_path / "to", Sizes(), {}, 1, False, pytest.fail)


def test_records_with_wrong_columns(tmp_path, one_device):
    folder = export(random_run(tmp_path / "run", SIZES, TOKENS), "--batch", "1", "--length", "4")
    model = Exported(folder)
    for rows in ([[1], [2]], [[1] * 5], [[]]):
        with pytest.raises(ValueError, match="rows must have 1 to 4 tokens"):
            model.generate(rows, 3)
    assert len(model.generate([[1, 2]], 99)[0]) <= 16  # the context has 20 places
