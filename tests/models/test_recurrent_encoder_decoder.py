"""The recurrent encoder–decoder against its papers in numpy, packed rows, and decoding."""

import functools

import jax
import numpy as np
import pytest
from recurrent_reference import draw, init_linear, stack
from scipy.special import softmax

from lm.models.classic.lstm import RecurrentConfig
from lm.models.classic.recurrent import LstmEncoderDecoder

V, D, H = 22, 5, 6
RNG = np.random.default_rng(0)
PAIRS = [(RNG.integers(0, V, s), RNG.integers(0, V, t)) for s, t in ((4, 3), (2, 5), (3, 1))]


@functools.cache
def make(bidirectional):
    config = RecurrentConfig(2, D, H, V, bidirectional=bidirectional, tie_embeddings=False)
    model = LstmEncoderDecoder(config)
    tokens = np.zeros((1, 2), int)
    return model, draw(model, tokens, tokens, tokens, tokens)


def paper(p, source, targets, both_ways):
    """Logits [L, V] of one pair: Dong and Lapata 2016, §3.1 and §3.3."""
    table = p["tokens"]["embedding"]
    encoded, finals = stack(p["encoder"], table[source], both_ways)
    h, _ = stack(p["decoder"], table[targets], before=finals)
    context = softmax(h @ encoded.T, axis=-1) @ encoded
    return init_linear(
        p["head"], np.tanh(init_linear(p["attended"], np.concatenate([h, context], axis=1)))
    )


def packed():
    """One row of all pairs, and padding at its end: tokens and segments of source and target."""
    rows = []
    for side in (0, 1):
        tokens = np.concatenate([pair[side] for pair in PAIRS])
        segments = np.repeat([1, 2, 3], [len(pair[side]) for pair in PAIRS])
        rows.append([np.pad(x, (0, 2))[None] for x in (tokens, segments)])
    (source, source_segments), (targets, target_segments) = rows
    return source, targets, source_segments, target_segments


@pytest.mark.parametrize("both_ways", [False, True])
def test_logits_of_packed_pairs_match_the_paper(both_ways):
    model, p = make(both_ways)
    inputs = packed()
    logits = np.asarray(jax.jit(model.apply)({"params": p}, *inputs))
    for segment, (source, targets) in enumerate(PAIRS, 1):
        expected = paper(p, source, targets, both_ways)
        np.testing.assert_allclose(logits[inputs[3] == segment], expected, atol=1e-5)
    alone = model.apply({"params": p}, source[None], targets[None])
    np.testing.assert_allclose(alone[0], expected, atol=1e-5)


def test_pairs_of_a_row_are_independent():
    model, p = make(True)
    _, _, source_segments, target_segments = packed()
    n_source, n_target = source_segments.size, target_segments.size
    assert n_source + n_target == V
    source = np.arange(n_source)[None]  # every token its own row of the table
    targets = n_source + np.arange(n_target)[None]

    def logits_of_the_second(table):
        changed = {"params": p | {"tokens": {"embedding": table}}}
        logits_BLV = model.apply(changed, source, targets, source_segments, target_segments)
        return (logits_BLV * (target_segments == 2)[..., None]).sum()

    table = np.random.default_rng(1).normal(size=(V, D)).astype(np.float32)
    slopes = abs(jax.grad(logits_of_the_second)(table)).sum(-1)
    own = np.concatenate([source_segments, target_segments], axis=1)[0] == 2
    np.testing.assert_array_equal(slopes > 0, own)


@pytest.mark.parametrize("both_ways", [False, True])
def test_token_by_token_decoding_matches_the_paper_for_selected_rows(both_ways):
    model, p = make(both_ways)
    source, segments = np.zeros((2, 3, 4), int)
    for row, (tokens, _) in enumerate(PAIRS):
        source[row, : len(tokens)], segments[row, : len(tokens)] = tokens, 1
    start = functools.partial(model.apply, method="start")
    cache = jax.jit(start, static_argnums=3)({"params": p}, source, segments, 9)
    rows = np.array([2, 1, 1])
    cache = cache.take(rows)
    targets = np.random.default_rng(2).integers(0, V, (3, 5))
    step = jax.jit(functools.partial(model.apply, method="decode"))
    found = []
    for chunk in (slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)):
        part = targets[:, chunk]
        logits, cache = step({"params": p}, part, None, np.ones_like(part), cache)
        found.append(logits)
    found = np.concatenate(found, axis=1)
    for row, pair in enumerate(rows):
        expected = paper(p, PAIRS[pair][0], targets[row], both_ways)
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
