"""The pointer-generator against See et al. 2017, eq. 8 and 9, in numpy; decoding; chunks."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from scipy.special import expit, softmax

from lm.models.classic.lstm import RecurrentConfig
from lm.models.classic.recurrent import LstmEncoderDecoder
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.transformer_config import TransformerConfig
from lm.objectives.losses import token_loss

V, S, T = 24, 9, 6
RNG = np.random.default_rng(0)
SOURCE, TARGET = RNG.integers(0, 12, (2, S)), RNG.integers(0, V, (2, T))  # sources repeat tokens
# Two pairs and padding in the first row, one pair in the second.
SOURCE_SEGMENTS = np.stack([np.repeat([1, 2, 0], [4, 3, 2]), np.ones(S, int)])
TARGET_SEGMENTS = np.stack([np.repeat([1, 2, 0], [3, 2, 1]), np.ones(T, int)])
INPUTS = (SOURCE, TARGET, SOURCE_SEGMENTS, TARGET_SEGMENTS)
MODELS = {
    "transformer": lambda chunk: EncoderDecoder(
        TransformerConfig(
            n_layers=1, d_model=16, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=16, vocab_size=V,
            max_length=S, positions="rotary", copy=True, loss_chunk=chunk,
        )
    ),
    "lstm": lambda chunk: LstmEncoderDecoder(
        RecurrentConfig(1, 8, 8, V, bidirectional=True, copy=True, loss_chunk=chunk)
    ),
}  # fmt: skip


@functools.cache
def make(name, chunk=0):
    model = MODELS[name](chunk)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *INPUTS)["params"])
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda x: np.float32(rng.normal(0, 0.5, x.shape)), shapes)


def run(name, *inputs, method=None, chunk=0):
    model, params = make(name, chunk)
    return jax.jit(functools.partial(model.apply, method=method))({"params": params}, *inputs)


@pytest.mark.parametrize("name", MODELS)
def test_probabilities_match_the_paper(name):
    found = np.exp(np.asarray(run(name, *INPUTS), np.float64))
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)

    params = make(name)[1]
    x = np.asarray(run(name, *INPUTS, method="decoder_hidden").x_BLD, np.float64)
    encoded = run(name, SOURCE, SOURCE_SEGMENTS, method="encode")
    encoded = np.asarray(encoded if name == "transformer" else encoded[0].encoded_BSD)
    scale = 16**-0.5 if name == "transformer" else 1
    query = x @ params["copy_query"]["kernel"] * scale
    gate = expit(x @ params["copy_gate"]["kernel"] + params["copy_gate"]["bias"])
    generated = softmax(
        x @ params["tokens"]["embedding"].T + params.get("bias", {"bias": 0})["bias"], axis=-1
    )
    for row, at in np.argwhere(TARGET_SEGMENTS > 0):
        own = SOURCE_SEGMENTS[row] == TARGET_SEGMENTS[row, at]
        weights = softmax(encoded[row, own] @ query[row, at])
        copied = np.zeros(V)
        np.add.at(copied, SOURCE[row, own], weights)
        p_gen = gate[row, at]
        expected = p_gen * generated[row, at] + (1 - p_gen) * copied
        np.testing.assert_allclose(found[row, at], expected, atol=2e-6)


@pytest.mark.parametrize("name", MODELS)
def test_stepwise_decoding_matches_the_full_pass_for_selected_rows(name):
    rows, ones = np.array([1, 0, 1]), np.ones((3, T), int)
    source, target = SOURCE[rows], TARGET[rows]
    segments = np.ones((3, S), int)
    expected = run(name, source, target, segments, ones)
    model, params = make(name)
    cache = model.apply({"params": params}, SOURCE, segments[:2], T, method="start").take(rows)
    step = jax.jit(functools.partial(model.apply, method="decode"))
    found = []
    for part in (slice(0, 3), slice(3, 4), slice(4, 6)):
        at = np.tile(np.arange(T)[part], (3, 1))
        logits, cache = step({"params": params}, target[:, part], at, ones[:, part], cache)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_its_gradient_are_the_same_in_chunks_and_finite_where_nothing_is_copied(name):
    """Half of the targets are in no source; smoothing weighs every token."""

    def loss(model, *inputs):
        x = model.decoder_hidden(*inputs)
        return token_loss(model, x, TARGET, np.float32(TARGET_SEGMENTS > 0), 0.1).loss

    def with_gradient(chunk):
        model, params = make(name, chunk)
        run = nn.apply(loss, model)
        return jax.jit(jax.value_and_grad(lambda p: run({"params": p}, *INPUTS)))(params)

    found = with_gradient(0), with_gradient(2)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    assert np.abs(found[0][1]["copy_gate"]["kernel"]).max() > 0
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *found)
