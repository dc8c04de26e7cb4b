"""Step-by-step decoding of targets with a cache, against the full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SOURCES = np.random.default_rng(1).integers(3, 8, (3, 5))
SOURCE_LENGTHS = np.array([5, 2, 3])
TARGETS = np.random.default_rng(2).integers(0, 8, (3, 6))
ORDER = np.array([2, 2, 0])  # rows that go on half-way, as in a beam search

MIXES = {
    "t5": {"model__positions": "relative", "model__norm": "rmsnorm"},
    "2017": {"model__positions": "sinusoidal", "model__norm_placement": "post"},
    "learned": {"model__positions": "learned", "model__n_decoder_layers": 1},
    "rotary": {"model__positions": "rotary", "model__n_kv_heads": 1},
}


@pytest.mark.parametrize("mix", MIXES)
def test_cached_decoding_gives_the_full_pass(make_experiment, mix):
    experiment, params, _ = make_experiment("encoder_decoder", **MIXES[mix])
    segments = (np.arange(5) < SOURCE_LENGTHS[:, None]).astype(int)

    def call(params, *inputs, **options):
        return experiment.model.apply({"params": params}, *inputs, **options)

    @jax.jit
    def start(params, *source):
        return call(params, *source, TARGETS.shape[1], method="start")

    @jax.jit
    def decode(params, tokens, at, cache):
        return call(params, tokens, at, jnp.ones_like(tokens), cache, method="decode")

    cache = start(params, SOURCES, segments)
    logits = []
    for chunk in ([0, 1], [2], [3], [4], [5]):
        if chunk == [3]:
            cache = cache.take(ORDER)
            logits = [x[ORDER] for x in logits]
        order = ORDER if chunk[0] >= 3 else np.arange(3)
        at = np.tile(chunk, (3, 1))
        out, cache = decode(params, TARGETS[order][:, chunk], at, cache)
        logits.append(np.asarray(out))

    full_pass = jax.jit(call)
    for row, source_row in enumerate(ORDER):
        n = SOURCE_LENGTHS[source_row]  # the full pass never sees the padding
        full = full_pass(
            params,
            SOURCES[[source_row], :n],
            TARGETS[[source_row]],
            np.ones((1, n), int),
            np.ones((1, 6), int),
        )
        cached = np.concatenate(logits, axis=1)[row]
        np.testing.assert_allclose(cached, full[0], rtol=1e-4, atol=1e-4)
