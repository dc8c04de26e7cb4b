"""The neural probabilistic language model against Bengio et al. 2003, in numpy."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from recurrent_reference import draw, init_linear

from lm.models.classic.feed_forward import Nplm, NplmConfig, Window

V, W, L = 12, 3, 7
TOKENS = np.random.default_rng(0).integers(0, V, (2, L))


@functools.cache
def make(direct=True):
    model = Nplm(NplmConfig(d_model=4, d_hidden=5, vocab_size=V, context=W, direct=direct))
    return model, draw(model, TOKENS)


def paper(p, tokens):
    """y = b + W x + U tanh(d + H x) (§2, equation 1) of one text; no word is a zero vector."""
    rows = np.concatenate([np.zeros((W - 1, 4)), p["tokens"]["embedding"][tokens]])
    x = np.stack([rows[i : i + W].ravel() for i in range(len(tokens))])
    y = init_linear(p["head"], np.tanh(init_linear(p["hidden_layer"], x)))
    return y + init_linear(p["direct"], x) if "direct" in p else y


@pytest.mark.parametrize("direct", [False, True])
def test_logits_match_the_paper(direct):
    model, p = make(direct)
    assert ("direct" in p) == direct
    logits = jax.jit(model.apply)({"params": p}, TOKENS)
    for row, tokens in enumerate(TOKENS):
        np.testing.assert_allclose(logits[row], paper(p, tokens), atol=1e-5)


def test_no_word_of_another_segment_is_seen():
    model, p = make()
    segments = np.array([[1, 1, 2, 2, 2, 3, 0]] * 2)
    logits = np.asarray(jax.jit(model.apply)({"params": p}, TOKENS, None, segments))
    for part in (slice(0, 2), slice(2, 5), slice(5, 6)):
        for row, tokens in enumerate(TOKENS):
            np.testing.assert_allclose(logits[row, part], paper(p, tokens[part]), atol=1e-5)


@pytest.mark.parametrize(
    ("words", "context", "width", "hidden", "direct", "count"),
    [
        (16_383, 4, 30, 100, False, 2_158_273),  # Brown, MLP9 and MLP10
        (16_383, 4, 60, 50, True, 5_762_483),  # Brown, MLP1 and MLP2
        (17_964, 5, 100, 60, True, 11_904_264),  # AP News, MLP10
    ],
)
def test_parameters_of_the_papers_models(words, context, width, hidden, direct, count):
    """Bengio et al. 2003, tables 1 and 2, by its formula of free parameters in §2."""
    model = Nplm(NplmConfig(width, hidden, words, context, direct))
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    assert sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(shapes))) == count


def test_decoding_from_a_left_padded_prompt_gives_the_full_pass():
    model, p = make()
    tokens = np.pad(TOKENS, ((0, 0), (2, 0)))
    segments = np.array([[0, 0] + [1] * L] * 2)
    cache = model.apply({}, 2, L, method="empty_cache")
    step = jax.jit(functools.partial(model.apply, method="decode"))
    found = []
    for chunk in (slice(0, 4), *(slice(i, i + 1) for i in range(4, 9))):
        logits, cache = step({"params": p}, tokens[:, chunk], None, segments[:, chunk], cache)
        found.append(logits)
    found = np.concatenate(found, axis=1)[:, 2:]
    for row, text in enumerate(TOKENS):
        np.testing.assert_allclose(found[row], paper(p, text), atol=1e-5)


def test_cache_takes_rows_for_a_beam_search():
    window = Window(np.arange(6).reshape(3, 2), np.array([[0, 1], [1, 1], [0, 0]]))
    taken = window.take(np.array([1, 1]))
    np.testing.assert_array_equal(taken.tokens_BW, [[2, 3], [2, 3]])
    np.testing.assert_array_equal(taken.segments_BW, [[1, 1], [1, 1]])


def test_dropout_acts_in_training_only():
    model, p = make()
    config = NplmConfig(4, 5, V, W, True, dropout=0.5)
    train = functools.partial(Nplm(config, deterministic=False).apply, {"params": p}, TOKENS)
    one, other = (train(rngs={"dropout": jax.random.key(seed)}) for seed in (1, 2))
    assert abs(one - other).max() > 0.1
    still = Nplm(config).apply({"params": p}, TOKENS)
    np.testing.assert_array_equal(still, model.apply({"params": p}, TOKENS))
