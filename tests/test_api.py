"""`import lm` from Python: shapes, values against the model itself, silence, and its errors."""

from __future__ import annotations

import subprocess
import sys

import jax
import numpy as np
import pytest

import lm
from lm.config import default, set_value


def make_config(text_file, **overrides):
    values = {
        "model.n_layers": 3,
        "model.d_model": 16,
        "model.n_heads": 4,
        "model.n_kv_heads": 2,
        "model.positions": "rotary",
        "data.source": f"text:{text_file}",
        "data.documents": "line",
        "data.validation_fraction": 0.2,
        "data.sequence_length": 16,
        "data.batch_size": 8,
        "data.workers": 1,
        "train.steps": 2,
        "log.tensorboard": False,
        **overrides,
    }
    config = default()
    for path, value in values.items():
        set_value(config, path, value)
    return config


@pytest.fixture(scope="module")
def run(text_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("api") / "run"
    assert lm.train(make_config(text_file), workdir)
    return lm.load_run(workdir)


def test_every_public_name_is_there():
    assert all(getattr(lm, name) is not None for name in lm.__all__)
    assert set(lm.__all__) <= set(dir(lm))
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = lm.trian


def test_importing_it_imports_no_jax():
    code = "import sys, lm; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_training_and_loading_print_nothing(text_file, tmp_path, capfd):
    lm.train(make_config(text_file), tmp_path / "run")
    lm.evaluate(lm.load_run(tmp_path / "run"))
    assert capfd.readouterr() == ("", "")


def test_logits_and_hidden_states_are_the_models(run):
    tokens_BL = run.encode("the model reads")[None]
    logits_BLV = run.logits(tokens_BL)
    assert logits_BLV.shape == (*tokens_BL.shape, run.config.model.vocab_size)
    assert logits_BLV.dtype == np.float32
    x_BLD = run.hidden_states(tokens_BL)
    assert x_BLD.shape == (*tokens_BL.shape, 16)
    tied = x_BLD @ run.params["tokens"]["embedding"].T
    np.testing.assert_allclose(logits_BLV, tied, rtol=1e-4, atol=1e-5)
    assert run.decode(tokens_BL[0]) == "the model reads"


def test_activations_are_captured_on_the_way_to_the_logits(run):
    tokens_BL = run.encode("the model")[None]
    found = run.activations(tokens_BL, capture=("attention", "residual"))
    assert set(found) == {"logits", "attention", "residual"}
    np.testing.assert_allclose(found["logits"], run.logits(tokens_BL), atol=1e-5)
    weights = run.attention_weights(tokens_BL)
    N, B, H, L, S = weights.shape
    assert (N, B, H, L) == (3, 1, 4, S)
    np.testing.assert_array_equal(weights, found["attention"])
    assert not weights[..., np.triu_indices(L, 1)[0], np.triu_indices(L, 1)[1]].any()
    assert np.abs(weights[0] - weights[1]).max() > 1e-4
    assert found["residual"].shape == (4, 1, L, 16)
    with pytest.raises(lm.UserError, match=r"cannot capture 'atention' \(known: attention,"):
        run.activations(tokens_BL, capture=("atention",))
    with pytest.raises(lm.UserError, match="token id 99999"):
        run.activations([[99999]])
    with pytest.raises(lm.UserError, match="batch of one text"):
        run.activations([1, 2])


def test_generation_matches_the_seed_and_length(run):
    texts = lm.generate(run, ["the", "a model"], max_new_tokens=5, seed=1)
    assert texts == lm.generate(run, ["the", "a model"], max_new_tokens=5, seed=1)
    (greedy,) = lm.generate(run, "the", max_new_tokens=3, temperature=0)
    ids = list(run.encode("the"))
    for _ in range(3):
        ids.append(int(run.logits(np.array([ids]))[0, -1].argmax()))
    assert run.decode(ids).startswith("the" + greedy)


def test_evaluation_matches_lm_eval(run):
    result = lm.evaluate(run)
    assert {"loss", "perplexity", "accuracy", "targets"} <= set(result)
    assert np.isfinite(result["loss"])


def test_configurations_take_values_and_text(tmp_path):
    file = tmp_path / "config.py"
    file.write_text("from lm.config import default\ndef get_config():\n    return default()\n")
    config = lm.load_config(str(file), {"train.steps": 7, "optimizer.learning_rate": "0.5"})
    assert (config.train.steps, config.optimizer.learning_rate) == (7, 0.5)
    with pytest.raises(lm.UserError, match=r"train\.stepz"):
        lm.load_config(str(file), {"train.stepz": 7})
    with pytest.raises(lm.UserError, match="no run in"):
        lm.load_run(tmp_path)


def test_build_gives_the_experiment(text_file):
    experiment = lm.build(make_config(text_file), jax.devices()[:1])
    assert experiment.param_shapes["tokens"]["embedding"].shape == (257, 16)


SCRIPT = """
import logging
from operator import methodcaller
from lm.data.tokenizing_pool import encode_in_processes
from lm.storage import lock
from pathlib import Path

def own(group):
    logging.getLogger(__name__)  # which is no guard
    return group

with lock(Path("lock")):  # that of a store
    print(*encode_in_processes(iter([[1, 2], [3]]), {encode}, 2))
"""


@pytest.mark.parametrize(
    ("encode", "out"),
    [("sum", "3 3\n"), ("methodcaller('count', '__main__.py')", "0 0\n"), ("own", "")],
)
def test_script_without_a_guard_does_not_run_twice(encode, out, tmp_path):
    """Workers import the script only for its own classes, and then it is an error of one line."""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.format(encode=encode))
    words = [sys.executable, str(file)]
    for given in (words, [sys.executable, "-m", "script"]):
        done = subprocess.run(
            given, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == (not out), done.stderr
        assert done.stdout == out
        last = done.stderr.splitlines()[-1:]
        assert out or "script.py: worker processes import it" in last[0]
