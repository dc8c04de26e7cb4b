"""Neurons with the highest activations, against those of the whole corpus at once."""

from __future__ import annotations

from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest

from lm.config import default, fill_defaults, set_value
from lm.errors import UserError
from lm.insight import neurons
from lm.insight.capture import run_and_capture
from lm.insight.neurons import N_CONTEXTS, N_NEURONS, top_neurons
from lm.models.transformer_config import make_model

TINY = {"model.n_layers": 2, "model.d_model": 8, "model.n_heads": 2, "model.vocab_size": 30}


@pytest.fixture(scope="module")
def made():
    config = default()
    for path, value in TINY.items():
        set_value(config, path, value)
    model = make_model(fill_defaults(config, "cpu"), "xla", "")
    tokens = np.random.default_rng(0).integers(0, 30, (6, 9)).astype(np.int32)
    segments = np.where(np.arange(9) < np.array([[9], [4], [9], [9], [5], [0]]), 1, 0)
    segments[0, 5:] = 2

    class Corpus:
        batch_size = 2

        def __len__(self):
            return 3

        def rows(self, number, rows):
            here = slice(2 * number, 2 * number + 2)
            return {"inputs": tokens[here], "segment_ids": segments[here]}

    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    params = nn.meta.unbox(variables["params"])

    def loss(model, batch):
        x = model.hidden(batch["inputs"], None, batch["segment_ids"])
        return SimpleNamespace(loss=x.sum())

    experiment = SimpleNamespace(model=model, objective=SimpleNamespace(loss=loss), param_infos={})
    return experiment, params, Corpus(), tokens, segments


def test_peaks_shares_and_contexts_match_all_activations(made):
    experiment, params, corpus, tokens, segments = made
    found = list(top_neurons(experiment, params, corpus))
    _, captured = run_and_capture(
        experiment.model,
        {"params": params},
        ("neurons",),
        lambda model: model.hidden(tokens, None, segments),
    )
    x_NBLF = np.where(segments[None, :, :, None] != 0, captured["neurons"], -np.inf)
    assert len(found) == N_NEURONS
    for layer in range(2):
        own = [neuron for neuron in found if neuron.layer == layer]
        peaks_F = x_NBLF[layer].max((0, 1))
        assert [n.index for n in own] == np.argsort(-peaks_F)[: len(own)].tolist()
        for neuron in own:
            x_BL = x_NBLF[layer, :, :, neuron.index]
            assert neuron.peak == pytest.approx(x_BL.max(), rel=1e-4)
            assert neuron.share == pytest.approx((x_BL > 0).sum() / (segments != 0).sum())
            by_row = np.sort(x_BL.max(1))[::-1][:N_CONTEXTS]
            peaks = [context.activations.max() for context in neuron.contexts]
            np.testing.assert_allclose(peaks, by_row[by_row > 0], rtol=1e-4)
            row, column = np.unravel_index(x_BL.argmax(), x_BL.shape)
            same = segments[row] == segments[row, column]
            assert neuron.contexts[0].ids.tolist() == tokens[row][same].tolist()


def test_model_of_experts_alone_has_none(made, monkeypatch):
    experiment, params, corpus, *_ = made
    monkeypatch.setattr(neurons, "run_and_capture", lambda *args: (None, {}))
    with pytest.raises(UserError, match="no dense feed-forward layers"):
        top_neurons(experiment, params, corpus)
