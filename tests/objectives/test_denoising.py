"""BART's corruption: infilled spans and shuffled sentences."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data.tokenizers.basic import CharTokenizer
from lm.errors import UserError
from lm.objectives.denoising import Denoising, fill_spans, span_lengths

CHARS = CharTokenizer("abcdefgh.?")  # ids 0 … 9; eos 10, the mask 11
STOPS = (8, 9, 10)
EOS, MASK = 10, 11
seeds = st.integers(0, 2**32 - 1)


def window(tokens, size):
    tokens = np.asarray(tokens, np.int32)
    padding = (0, size - len(tokens))
    return {"tokens": np.pad(tokens, padding), "segment_ids": np.pad(np.ones_like(tokens), padding)}


def sentences(tokens):
    found = [[]]
    for token in tokens:
        found[-1].append(token)
        if token in STOPS:
            found.append([])
    return Counter(tuple(sentence) for sentence in found if sentence)


def test_example_of_the_paper():
    """Lewis et al. 2020, figure 2: text infilling of "ABC.DE." gives "A_.D_E."."""
    text = np.array([ord(letter) for letter in "ABC.DE."])
    found = fill_spans(text, np.array([2, 0]), np.array([1, 3]), ord("_"))
    assert "".join(map(chr, found)) == "A_.D_E."


@given(st.integers(1, 200), st.floats(0.1, 9.0), seeds)
def test_spans_have_the_tokens_together(n_masked, mean_span, seed):
    lengths = span_lengths(n_masked, mean_span, np.random.default_rng(seed))
    assert lengths.sum() == n_masked
    assert lengths.min() >= 0
    assert lengths[-1] > 0


def test_lengths_match_a_poisson_distribution():
    lengths = span_lengths(300_000, 3.0, np.random.default_rng(0))[:-1]
    share = np.bincount(lengths, minlength=4)[:4] / len(lengths)
    np.testing.assert_allclose(share, np.exp(-3) * np.array([1, 3, 4.5, 4.5]), atol=0.005)


@given(
    st.lists(st.integers(0, 10), min_size=1, max_size=30),
    st.floats(0.05, 0.9),
    st.floats(0.1, 6.0),
    seeds,
)
def test_unmasked_tokens_are_the_text(tokens, rate, mean_span, seed):
    objective = Denoising(
        CHARS, 32, infill_rate=rate, infill_span=mean_span, permute_sentences=False
    )
    found = objective.features(window(tokens, 30), np.random.default_rng(seed))
    targets = found["targets"][found["weights"] == 1]
    assert targets.tolist() == [*tokens, EOS]
    assert found["inputs"][: len(targets)].tolist() == [EOS, *tokens]
    *source, end = found["source"][found["source_segments"] == 1].tolist()
    assert end == EOS
    assert len(source) <= len(tokens)
    masks = [i for i, token in enumerate(source) if token == MASK]
    assert masks
    assert all(b - a > 1 for a, b in pairwise(masks))
    kept = iter(tokens)
    assert all(token in kept for token in source if token != MASK)  # in their order
    if len(tokens) - len(masks) * 2 > rate * len(tokens):
        n_removed = len(tokens) - (len(source) - len(masks))
        assert n_removed <= max(1, round(rate * len(tokens)))


@given(st.lists(st.integers(0, 10), min_size=1, max_size=30), seeds)
def test_sentences_are_shuffled_whole(tokens, seed):
    objective, tokens = Denoising(CHARS, 33, infill_rate=0.001), [*tokens, 8]
    source, targets = objective.corrupt(np.array(tokens), np.random.default_rng(seed))
    assert targets.tolist() == [*tokens, EOS]
    (at,) = np.flatnonzero(source == MASK)
    candidates = [[*source[:at], token, *source[at + 1 : -1]] for token in range(11)]
    candidates += [[*source[:at], *source[at + 1 : -1]]]
    assert any(sentences(candidate) == sentences(tokens) for candidate in candidates)


def test_all_orders_of_sentences_are_equally_likely():
    objective, rng = Denoising(CHARS, 32), np.random.default_rng(0)
    text = np.array([0, 8, 1, 9, 2])
    seen = Counter(tuple(objective._permuted(text, rng)) for _ in range(3000))
    assert len(seen) == 6
    assert all(count == pytest.approx(500, abs=100) for count in seen.values())
    assert (0, 8, 2, 1, 9) in seen


def test_about_the_rate_is_masked():
    objective, rng = Denoising(CHARS, 302), np.random.default_rng(0)
    tokens = rng.integers(0, 8, 300)
    sources = [objective.corrupt(tokens, rng)[0] for _ in range(50)]
    masks = np.array([(source == MASK).sum() for source in sources])
    kept = np.array([(source < EOS).sum() for source in sources])
    assert (kept == 210).all()  # 30 %
    assert masks.mean() == pytest.approx(90 / 3, rel=0.1)


def test_shapes_do_not_depend_on_the_tokenizer():
    found = Denoising(CHARS, 32).features(window([1, 2, 8], 30), np.random.default_rng(0))
    shapes = Denoising(None, 32).shapes
    assert {name: (x.shape, x.dtype.name) for name, x in found.items()} == shapes
    assert Denoising(CHARS, 32).n_extra_ids == 2


def test_no_room_is_reported():
    with pytest.raises(UserError, match="sequence_length=3 leaves no room"):
        Denoising(CHARS, 3)
