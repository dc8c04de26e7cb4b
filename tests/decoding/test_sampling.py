import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.decoding.sampling import Sampling, first_largest, in_nucleus, sample_tokens

# Probabilities 0.4, 0.3, 0.15, 0.1, 0.05 of tokens 3, 0, 4, 1, 2.
PROBABILITIES = np.array([0.3, 0.1, 0.05, 0.4, 0.15])
LOGITS = jnp.asarray(np.log(PROBABILITIES) + 7, jnp.float32)
N = 4000


@functools.partial(jax.jit, static_argnums=1)
def choose(logits, sampling, key):
    return sample_tokens(logits, sampling, jax.random.split(key, len(logits)))


def draw(sampling):
    """N draws, each a row of its own."""
    return np.asarray(choose(jnp.tile(LOGITS, (N, 1)), sampling, jax.random.key(0)))


def assert_follows(drawn, probabilities):
    """Nothing of probability 0, and the rest by a chi-square test at 0.1 %."""
    counts = np.bincount(drawn, minlength=len(probabilities))
    assert not counts[probabilities == 0].any()
    if np.count_nonzero(probabilities) > 1:
        expected = probabilities[probabilities > 0] * N
        assert scipy.stats.chisquare(counts[probabilities > 0], expected).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_a_temperature(temperature):
    expected = scipy.special.softmax(np.log(PROBABILITIES) / temperature)
    assert_follows(draw(Sampling(temperature)), expected)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_k=1), [3]),
        (Sampling(top_k=3), [3, 0, 4]),
        (Sampling(top_k=99), [3, 0, 4, 1, 2]),
        (Sampling(top_p=0.35), [3]),
        (Sampling(top_p=0.65), [3, 0]),
        (Sampling(top_p=0.75), [3, 0, 4]),
        (Sampling(top_p=0.99), [3, 0, 4, 1, 2]),
        # After top_k = 2 the probabilities are 4/7 and 3/7: the first alone reaches 0.5.
        (Sampling(top_k=2, top_p=0.5), [3]),
    ],
)
def test_filtered_distribution_keeps_its_proportions(sampling, kept):
    expected = np.zeros(5)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    assert_follows(draw(sampling), expected)


def test_temperature_acts_before_top_p():
    """At temperature 3 the most likely has probability 0.27, so 0.35 needs two tokens."""
    hot = scipy.special.softmax(np.log(PROBABILITIES) / 3)
    expected = np.where(np.arange(5) % 3 == 0, hot, 0)
    assert_follows(draw(Sampling(temperature=3.0, top_p=0.35)), expected / expected.sum())


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(top_p=1e-6), Sampling(top_k=1)])
def test_greedy_takes_the_most_likely_token(sampling):
    logits = jax.random.normal(jax.random.key(1), (64, 17))
    found = choose(logits, sampling, jax.random.key(0))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.asarray(logits).argmax(-1))


def test_draw_does_not_depend_on_the_other_rows():
    logits = jax.random.normal(jax.random.key(1), (8, 17))
    others = logits.at[1:].set(jax.random.normal(jax.random.key(2), (7, 17)))
    for seed in range(20):
        key = jax.random.key(seed)
        assert choose(logits, Sampling(), key)[0] == choose(others, Sampling(), key)[0]
    assert len(np.unique(draw(Sampling()))) == 5  # but rows do not all draw the same


# Few values, so that many are equal; -inf is a token that is ruled out.
ROWS = st.lists(st.sampled_from([-np.inf, -3.0, -1.0, 0.0, 0.5, 2.0]), min_size=6, max_size=6)
nucleus = jax.jit(in_nucleus, static_argnums=1)


@settings(deadline=None, max_examples=60)
@given(row=ROWS, p=st.sampled_from([0.0, 0.3, 0.6, 0.95]))
def test_nucleus_is_what_sorting_finds(row, p):
    row[0] = 0.0
    probabilities = scipy.special.softmax(np.asarray(row))
    likelier = (probabilities * (probabilities[None] > probabilities[:, None])).sum(1)
    expected = (likelier < p - 1e-6) | (probabilities == probabilities.max())
    if np.abs(likelier - p).min() > 1e-5:
        assert nucleus(np.float32([row]), p)[0].tolist() == expected.tolist()
    assert first_largest(jnp.float32(row)) == np.argmax(row)
