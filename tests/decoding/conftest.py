import functools

import jax
import numpy as np
import pytest

from lm.config import default, set_value
from lm.data.special_tokens import target_start
from lm.data.tokenizer import Tokenizer
from lm.experiment import build


class Letters(Tokenizer):
    """A tokenizer of few tokens: 0 fills rows, 1 starts and 2 ends a text, 3 … are the letters."""

    vocab_size = 0
    bos_id, eos_id = 1, 2

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode(self, text):
        return np.array([ord(letter) - ord("a") + 3 for letter in text], np.int32)

    def decode(self, ids):
        return "".join(chr(int(i) - 3 + ord("a")) for i in ids if i > 2)

    def token_id(self, name):
        return {"<pad>": 0, "<a>": 3, "<b>": 4}.get(name)

    def files(self):
        return {}

    @classmethod
    def from_files(cls, files):
        return cls(0)


@functools.cache
def _make_experiment(family, changes, n_devices):
    config = default()
    values = {
        "model.family": family,
        "objective.name": "seq2seq" if "encoder_decoder" in family else "causal",
        "model.n_layers": 2,
        "model.d_model": 16,
        "model.n_heads": 2,
        "model.vocab_size": 8,
        "model.tie_embeddings": False,
        "data.sequence_length": 12,
        "data.batch_size": 8,
        "decode.max_length": 6,
    }
    for path, value in {**values, **dict(changes)}.items():
        set_value(config, path.replace("__", "."), value)
    experiment = build(config, jax.devices()[:n_devices])
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        centre, deviation = (1, 0.2) if path[-1].key == "scale" else (0, 0.6)
        return np.float32(rng.normal(centre, deviation, leaf.shape))

    params = jax.tree_util.tree_map_with_path(draw, experiment.state_shapes.params)
    return experiment, params, Letters(experiment.config.model.vocab_size)


@pytest.fixture
def make_experiment():
    """Make (experiment, params, tokenizer) of a random model of 8 tokens, 2 layers, 16 wide.

    Every parameter is random: none has a special value.
    """
    return lambda family, n_devices=1, **changes: _make_experiment(
        family, tuple(sorted(changes.items())), n_devices
    )


def _log_probabilities(experiment, params, text, outputs):
    """Of every token of each output, [N, T], by full forward passes without a cache."""
    outputs = np.asarray(outputs)
    if "encoder_decoder" in experiment.config.model.family:
        start = target_start(Letters(8), experiment.config.data.target_prefix)
        before = np.concatenate([np.tile(start, (len(outputs), 1)), outputs[:, :-1]], axis=1)
        sources = np.tile(text, (len(outputs), 1))
        ones = np.ones_like(sources), np.ones_like(before)
        logits = _apply(experiment.model)(params, sources, before, *ones)[:, len(start) - 1 :]
    else:
        tokens = np.concatenate([np.tile(text, (len(outputs), 1)), outputs], axis=1)
        logits = _apply(experiment.model)(params, tokens)[:, len(text) - 1 : -1]
    scores = jax.nn.log_softmax(logits)
    return np.take_along_axis(np.asarray(scores, np.float64), outputs[:, :, None], axis=2)[:, :, 0]


@functools.cache
def _apply(model):
    return jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))


@pytest.fixture
def log_probabilities():
    return _log_probabilities
