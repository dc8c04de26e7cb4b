"""The LSTM against its paper in numpy: logits, counts, state, segments, dropout, classification."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrent_reference import draw, init_linear, stack

from lm.experiment import build
from lm.models.classic.lstm import LstmCache, RecurrentConfig
from lm.models.classic.recurrent import Lstm

V, D, H, L = 20, 5, 6, 8
TOKENS = np.random.default_rng(0).integers(0, V, (3, L))


@functools.cache
def _make(changes):
    config = {"n_layers": 2, "d_model": D, "d_hidden": H, "vocab_size": V, "tie_embeddings": False}
    model = Lstm(RecurrentConfig(**config | dict(changes)))
    return model, draw(model, TOKENS)


def make(**changes):
    return _make(tuple(sorted(changes.items())))


def run(model, params, *inputs, **options):
    return jax.jit(functools.partial(model.apply, **options))({"params": params}, *inputs)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("d_model", [D, H])
def test_logits_match_the_paper(tied, d_model):
    model, p = make(tie_embeddings=tied, d_model=d_model)
    logits = run(model, p, TOKENS)
    assert logits.dtype == jnp.float32
    assert ("projection" in p) == (tied and d_model != H)
    table = p["tokens"]["embedding"]
    for row, tokens in enumerate(TOKENS):
        x, _ = stack(p["stack"], table[tokens])
        if "projection" in p:
            x = x @ p["projection"]["kernel"]
        expected = x @ table.T + p["bias"]["bias"] if tied else init_linear(p["head"], x)
        np.testing.assert_allclose(logits[row], expected, atol=1e-5)


@pytest.mark.parametrize(("width", "count"), [(650, 19_780_400), (1500, 66_034_000)])
def test_parameters_of_the_papers_models(width, count):
    """Zaremba et al. 2014, §4.1, medium and large, with the biases of its code."""
    model = Lstm(RecurrentConfig(2, width, width, 10_000, tie_embeddings=False))
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    assert sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(shapes))) == count


def test_uniform_initialization_reaches_every_parameter():
    for tied in (False, True):
        config = RecurrentConfig(1, 40, 50, 300, tie_embeddings=tied, init="uniform", init_std=0.05)
        init = jax.jit(Lstm(config).init)(jax.random.key(0), TOKENS)
        for path, x in jax.tree.leaves_with_path(nn.meta.unbox(init["params"])):
            assert 0.045 < abs(x).max() <= 0.05, path
            assert x.std() == pytest.approx(0.05 / 3**0.5, rel=0.15), path


def test_other_initializations_start_with_an_open_forget_gate():
    config = RecurrentConfig(1, 40, 50, 300, init="fan_in", init_std=0.02)
    p = nn.meta.unbox(jax.jit(Lstm(config).init)(jax.random.key(0), TOKENS))["params"]
    layer = p["stack"]["layer_0"]
    np.testing.assert_array_equal(layer["input"]["bias"], [[0] * 50, [1] * 50, [0] * 50, [0] * 50])
    np.testing.assert_array_equal(layer["recurrent"]["bias"], 0)
    assert layer["input"]["kernel"].std() == pytest.approx(40**-0.5, rel=0.05)
    assert layer["recurrent"]["kernel"].std() == pytest.approx(50**-0.5, rel=0.05)
    assert p["tokens"]["embedding"].std() == pytest.approx(0.02, rel=0.05)


def test_carried_state_makes_two_windows_one_text_except_in_fresh_rows():
    model, p = make(carry=True)
    whole = run(make()[0], p, TOKENS)
    fresh = run(make()[0], p, TOKENS[:, 4:])
    empty = {"state": np.zeros((3, 2, 2, H), np.float32)}
    for segments in (None, np.ones((3, 4), int)):
        variables, found = {"params": p, "carry": empty}, []
        for at, begins in ((0, [1, 1, 1]), (4, [0, 1, 0])):
            window = (TOKENS[:, at : at + 4], None, segments, np.array(begins))
            logits, after = jax.jit(functools.partial(model.apply, mutable="carry"))(
                variables, *window
            )
            variables |= after
            found.append(np.asarray(logits))
        np.testing.assert_allclose(found[0], whole[:, :4], atol=1e-5)
        np.testing.assert_allclose(found[1][[0, 2]], whole[[0, 2], 4:], atol=1e-5)
        np.testing.assert_allclose(found[1][1], fresh[1], atol=1e-5)
    np.testing.assert_allclose(run(model, p, TOKENS), whole, atol=1e-6)


def test_fresh_rows_reset_the_carry():
    model, p = make(carry=True)
    left = {"state": np.random.default_rng(0).normal(size=(3, 2, 2, H)).astype(np.float32)}
    logits, _ = model.apply(
        {"params": p, "carry": left}, TOKENS, fresh_B=np.ones(3, int), mutable="carry"
    )
    np.testing.assert_allclose(logits, run(make()[0], p, TOKENS), atol=1e-6)


def test_segments_of_a_row_are_apart():
    model, p = make()
    segments = np.array([[1, 1, 1, 2, 2, 3, 3, 3]] * 3)
    logits = run(model, p, TOKENS, None, segments)
    for part in (slice(0, 3), slice(3, 5), slice(5, 8)):
        np.testing.assert_allclose(logits[:, part], run(model, p, TOKENS[:, part]), atol=1e-5)

    def outputs_of_the_second(table):
        changed = p | {"tokens": {"embedding": table}}
        x_BLH = model.apply({"params": changed}, row, None, segments[:1], method="hidden")
        return x_BLH[0, 3:5].sum()

    row = np.arange(L)[None]  # every token its own row of the table
    slopes = abs(jax.grad(outputs_of_the_second)(p["tokens"]["embedding"])).sum(-1)
    np.testing.assert_array_equal(slopes[:L] > 0, segments[0] == 2)


def test_dropout_acts_in_training_only():
    model, p = make(dropout=0.5)
    train = functools.partial(run, model.clone(deterministic=False), p, TOKENS)
    one, again, other = (train(rngs={"dropout": jax.random.key(seed)}) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert abs(one - other).max() > 0.1
    np.testing.assert_array_equal(run(model, p, TOKENS), run(make()[0], p, TOKENS))


@pytest.mark.parametrize(
    ("n_layers", "method", "silent", "drops"),
    [
        (1, "hidden", False, True),  # the input of the first layer
        (1, "hidden", True, False),  # nothing from token to token
        (2, "hidden", True, True),  # the input of the second layer
        (1, "__call__", True, True),  # its output
    ],
)
def test_dropout_applies_to_layer_inputs_and_outputs(n_layers, method, silent, drops):
    model, p = make(dropout=0.5, n_layers=n_layers)
    if silent:  # embeddings of 0 have nothing to drop
        p = p | {"tokens": {"embedding": np.zeros((V, D), np.float32)}}
    rngs = {"dropout": jax.random.key(1)}
    dropped = run(model.clone(deterministic=False), p, TOKENS, rngs=rngs, method=method)
    assert (abs(dropped - run(model, p, TOKENS, method=method)).max() > 0.01) == drops


def test_bidirectional_text_encoder_matches_the_paper_and_ignores_padding():
    model, _ = make(bidirectional=True, n_classes=3)

    def scores(model, tokens, segments):
        x_BLH = model.hidden(tokens, None, segments, None)
        return model.classify(model.pooled(x_BLH, segments)), x_BLH

    def apply(params, tokens, segments):
        return jax.jit(nn.apply(scores, model))({"params": params}, tokens, segments)

    def init(key):
        return nn.init(scores, model)(key, TOKENS, TOKENS)

    shapes = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(0)
    p = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.5, x.shape)), nn.meta.unbox(shapes))
    p = p["params"]
    assert "head" not in p
    lengths = [8, 5, 1]
    segments = (np.arange(L) < np.array(lengths)[:, None]).astype(int)
    found, _ = apply(p, TOKENS, segments)
    for row, length in enumerate(lengths):
        x, _ = stack(p["stack"], p["tokens"]["embedding"][TOKENS[row, :length]], both_ways=True)
        expected = init_linear(p["classifier"], x.max(0))
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_decoding_from_left_padded_prompts_gives_the_full_pass():
    model, p = make()
    full = np.asarray(run(model, p, TOKENS))
    lengths, width = np.array([4, 2, 3]), 4
    pads = width - lengths
    places = np.arange(L + 2) - pads[:, None]
    segments = (places >= 0).astype(int)
    padded = np.take_along_axis(TOKENS, np.clip(places, 0, L - 1), axis=1)
    cache = model.apply({}, 3, L, method="empty_cache")
    step = jax.jit(functools.partial(model.apply, method="decode"))
    found = []
    for chunk in [slice(0, width), *(slice(i, i + 1) for i in range(width, L + 2))]:
        logits, cache = step({"params": p}, padded[:, chunk], None, segments[:, chunk], cache)
        found.append(logits)
    found = np.concatenate(found, axis=1)
    for row, pad in enumerate(pads):
        n = min(L, L + 2 - pad)
        np.testing.assert_allclose(found[row, pad : pad + n], full[row, :n], atol=1e-5)


def test_cache_takes_rows_for_a_beam_search():
    cache = LstmCache(np.arange(3.0).reshape(3, 1, 1, 1), np.array([0, 1, 1])).take(
        np.array([2, 0])
    )
    np.testing.assert_array_equal(cache.state_BN2H.ravel(), [2, 0])
    np.testing.assert_array_equal(cache.segment_B, [1, 0])


def test_bfloat16_computes_in_bfloat16_and_keeps_parameters_and_logits_float32():
    full, p = make()
    model, _ = make(dtype=jnp.dtype("bfloat16"))
    logits = run(model, p, TOKENS)
    assert logits.dtype == jnp.float32
    exact = run(full, p, TOKENS)
    assert 1e-4 < abs(logits - exact).max() < 0.05 * abs(exact).max()
    grads = jax.eval_shape(jax.grad(lambda p: model.apply({"params": p}, TOKENS).sum()), p)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))


def test_training_passes_the_state_from_batch_to_batch(tiny_config):
    config = tiny_config(
        model__family="lstm",
        model__carry=True,
        data__order="contiguous",
        data__isolate_documents=False,
        data__sequence_length=4,
        train__microbatches=2,
        optimizer__learning_rate=0.0,
    )
    experiment = build(config, jax.devices()[:1])
    tokens = np.random.default_rng(0).integers(0, 256, (8, 9)).astype(np.int32)
    windows = np.stack([tokens[:, :4], tokens[:, 4:8]])  # [steps, B, L]
    batches = {
        "inputs": windows,
        "targets": np.stack([tokens[:, 1:5], tokens[:, 5:9]]),
        "fresh": np.repeat([[1], [0]], 8, axis=1).astype(np.int32),
        "weights": np.ones(windows.shape, np.float32),
    }
    state, metrics = experiment.train_steps(experiment.init_state(), batches)
    assert np.isfinite(metrics["loss"]).all()
    assert not metrics["skipped"].any()
    params = jax.tree.map(np.asarray, state.params)
    for row, text in enumerate(tokens):
        _, finals = stack(params["stack"], params["tokens"]["embedding"][text[:8]])
        carried = state.carry["carry"]["carried"]["state"][row]
        np.testing.assert_allclose(carried, finals, atol=1e-6)
