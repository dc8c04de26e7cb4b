"""Optimizers and decayed parameters, as in the papers."""

import jax
import pytest
from experiment_files import load

from lm.experiment import build_untraced
from lm.models.variables import flat
from lm.optim.optimizers import ParamTable

# --- first and second moment's decay, epsilon, weight decay, clipping; dropout

ADAM = {
    "gpt1.py:117m": (0.9, 0.999, 1e-8, 0.01, 1.0, 0.1),
    "gpt2.py:124m": (0.9, 0.95, 1e-8, 0.1, 1.0, 0.0),
    "gpt2.py:nanogpt": (0.9, 0.95, 1e-8, 0.1, 1.0, 0.0),
    "gpt3.py:175b": (0.9, 0.95, 1e-8, 0.1, 1.0, 0.0),
    "bert.py:large": (0.9, 0.999, 1e-6, 0.01, 1.0, 0.1),
    "roberta.py:base": (0.9, 0.98, 1e-6, 0.01, 0.0, 0.1),
    "transformer2017.py:base": (0.9, 0.98, 1e-9, 0.0, 0.0, 0.1),
    "transformer2017.py:big": (0.9, 0.98, 1e-9, 0.0, 0.0, 0.3),
    "transformer2017.py:big-fr": (0.9, 0.98, 1e-9, 0.0, 0.0, 0.1),
    "llama.py:1-65b": (0.9, 0.95, 1e-8, 0.1, 1.0, 0.0),
    "llama.py:2-7b": (0.9, 0.95, 1e-5, 0.1, 1.0, 0.0),
}


@pytest.mark.parametrize("spec", ADAM)
def test_adam(spec):
    config = load(spec)
    optimizer, adam = config.optimizer, config.optimizer.adamw
    assert optimizer.name == "adamw"
    assert adam.bias_correction == (not spec.startswith("bert"))
    found = (adam.b1, adam.b2, adam.eps, optimizer.weight_decay, optimizer.clip_norm)
    assert (*found, config.model.dropout) == ADAM[spec]


@pytest.mark.parametrize(
    "spec", ["t5.py:large", "t5.py:1.1-large", "mt5.py:base", "switch.py:base-8"]
)
def test_adafactor_of_t5(spec):
    """Raffel et al. 2020, §3.1.2 and the released settings; 1.1 and Switch pretrain without
    dropout."""
    config = load(spec)
    optimizer, adafactor = config.optimizer, config.optimizer.adafactor
    assert (optimizer.name, optimizer.weight_decay, optimizer.clip_norm) == ("adafactor", 0, 0)
    assert (adafactor.decay_rate, adafactor.clip_threshold) == (0.8, 1.0)
    assert (adafactor.parameter_scale, adafactor.min_dim) == (True, 128)
    assert config.model.dropout == (0.1 if spec == "t5.py:large" else 0)


@pytest.mark.parametrize(
    ("size", "dropout", "bound", "clip"), [("medium", 0.5, 0.05, 5), ("large", 0.65, 0.04, 10)]
)
def test_sgd_of_zaremba(size, dropout, bound, clip):
    config = load(f"zaremba.py:{size}")
    optimizer, model = config.optimizer, config.model
    assert (optimizer.name, optimizer.sgd.momentum, optimizer.weight_decay) == ("sgd", 0, 0)
    assert optimizer.clip_norm == pytest.approx(clip / 35)  # of a mean of 35 words
    assert (model.dropout, model.init, model.init_std) == (dropout, "uniform", bound)


# --- what decays

LAYER = ("attention/key", "attention/out", "attention/query", "attention/value")
FEED_FORWARD = ("feed_forward/in", "feed_forward/out")
GATED = ("feed_forward/gate", *FEED_FORWARD)
DECAYING = {
    # every matrix, the tables too (llm.c; nanoGPT: dimensions of 2 and more)
    "gpt2.py:124m": (("positions", "tokens"), (), FEED_FORWARD),
    # all but those whose names have LayerNorm, layer_norm or bias (google-research/bert)
    "bert.py:base": (
        ("positions", "tokens", "types"),
        ("pooler", "sentence_head", "transform"),
        FEED_FORWARD,
    ),
    "gpt1.py:117m": (("positions", "tokens"), (), FEED_FORWARD),
    "llama.py:3-8b": (("tokens",), ("head",), GATED),
    # queries' biases and norms of heads do not
    "qwen.py:2-7b": (("tokens",), ("head",), GATED),
    "qwen.py:3-8b": (("tokens",), ("head",), GATED),
}


def decaying(config):
    experiment = build_untraced(config, jax.devices()[:1])
    table = ParamTable(experiment.param_infos, config.optimizer.decay)
    mask = flat(table.decay_mask(experiment.param_shapes))
    return {path for path, decays in mask.items() if decays}


@pytest.mark.parametrize("spec", DECAYING)
def test_weight_decay_mask(spec):
    tables, outside, feed_forward = DECAYING[spec]
    assert decaying(load(spec)) == {
        *(f"{name}/embedding" for name in tables),
        *(f"{name}/kernel" for name in outside),
        *(f"stack/layers/{name}/kernel" for name in (*LAYER, *feed_forward)),
    }


def test_weight_decay_mask_of_the_nplm():
    """Bengio et al. 2003, §3.1: all weights and the features, no bias."""
    config = load("nplm.py:mlp1")
    experiment = build_untraced(config, jax.devices()[:1])
    biases = {path for path in flat(experiment.param_shapes) if path.endswith("bias")}
    assert decaying(config) == set(flat(experiment.param_shapes)) - biases
    assert biases
