"""ELECTRA's objective: the generator's replacements, and the sum of both losses."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data.tokenizers.basic import ByteTokenizer
from lm.objectives.replaced_tokens import ReplacedTokens, sample_replacements

OBJECTIVE = ReplacedTokens(ByteTokenizer(), 22, mask_rate=0.25)


def window(n_tokens, seed):
    rng = np.random.default_rng(seed)
    padding = (0, 20 - n_tokens)
    arrays = {
        "tokens": rng.integers(0, 256, n_tokens),
        "segment_ids": np.sort(rng.integers(1, 3, n_tokens)),
        "positions": np.arange(n_tokens),
    }
    arrays["segment_ids"] -= arrays["segment_ids"][0] - 1
    return {name: np.pad(x.astype(np.int32), padding) for name, x in arrays.items()}


@given(st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_masks_are_at_the_predicted_positions(n_tokens, seed):
    example = window(n_tokens, seed)
    found = OBJECTIVE.features(example, np.random.default_rng(seed))
    assert {name: (x.shape, x.dtype.name) for name, x in found.items()} == OBJECTIVE.shapes
    n = max(1, round(0.25 * n_tokens))
    assert found["weights"].sum() == n
    masked = found["replaced_by"] > 0
    assert masked.sum() == n
    assert (found["inputs"][masked] == OBJECTIVE._special.mask).all()  # all of them
    np.testing.assert_array_equal(found["inputs"][~masked], found["originals"][~masked])
    np.testing.assert_array_equal(
        found["originals"][1 : n_tokens + 1], example["tokens"][:n_tokens]
    )
    np.testing.assert_array_equal(np.flatnonzero(masked), found["masked_positions"][:n])
    assert found["replaced_by"][masked].tolist() == list(range(1, n + 1))


def test_samples_follow_the_distribution_and_their_row():
    logits = jnp.log(jnp.array([[[0.5, 0.3, 0.2]] * 4000] * 2))
    found = np.asarray(sample_replacements(logits, jnp.array([3, 4])))
    for row in found:
        np.testing.assert_allclose(np.bincount(row) / 4000, [0.5, 0.3, 0.2], atol=0.03)
    assert (found[0] != found[1]).any()
    np.testing.assert_array_equal(sample_replacements(logits[1:], jnp.array([4])), found[1:])


class Scorer:
    """A generator that is sure of some tokens, and a discriminator with given scores."""

    config, deterministic = SimpleNamespace(loss_chunk=0), True

    def __init__(self, logits, scores):
        self._logits, self._scores, self.seen = logits, scores, []

    def generator_hidden(self, tokens, positions, segments):
        return jnp.zeros((*tokens.shape, 1))

    def generator_logits(self, x):
        return self._logits

    def hidden(self, tokens, positions, segments):
        self.seen.append(np.asarray(tokens))
        return tokens

    def replaced(self, x):
        return self._scores


def test_loss_matches_the_paper():
    """Clark et al. 2020, §2: L_MLM + 50 L_Disc in numpy; a right sample counts as original."""
    rng = np.random.default_rng(0)
    rows = [OBJECTIVE.features(window(20, seed), rng) for seed in (1, 2)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    n_vocab, (n_rows, n_masked) = 300, batch["targets"].shape
    sure = batch["targets"].copy()
    sure[:, 0] = (sure[:, 0] + 1) % 256  # the first one of a row is wrong
    logits = np.full((n_rows, n_masked, n_vocab), -50.0)
    np.put_along_axis(logits, sure[..., None], 50.0, axis=-1)
    scores = rng.normal(size=(n_rows, 22)).astype(np.float32)
    model = Scorer(jnp.asarray(logits, jnp.float32), jnp.asarray(scores))
    sums = OBJECTIVE.loss(model, jax.tree.map(jnp.asarray, batch))
    (seen,) = model.seen
    expected = batch["originals"].copy()
    wrong = np.zeros((n_rows, 22), bool)
    for row in range(n_rows):
        at = batch["masked_positions"][row, 0]
        expected[row, at], wrong[row, at] = sure[row, 0], True
    np.testing.assert_array_equal(seen, expected)
    p = 1 / (1 + np.exp(-scores.astype(float)))
    bce = -np.where(wrong, np.log(p), np.log(1 - p))
    weight = batch["weights"].sum()
    mlm = 100.0 * n_rows  # of the wrong ones; the others cost nothing
    np.testing.assert_allclose(sums.weight, weight)
    np.testing.assert_allclose(sums.loss, mlm + 50 * bce.mean() * weight, rtol=1e-5)
    np.testing.assert_allclose(sums.metrics["nll"], mlm, rtol=1e-5)
    right = ((scores > 0) == wrong).mean()
    assert float(sums.metrics["replaced_accuracy"] / weight) == pytest.approx(right)
    assert float(sums.metrics["replaced_share"] / weight) == pytest.approx(1 / 22)


def test_no_gradient_passes_through_the_samples():
    rows = OBJECTIVE.features(window(20, 0), np.random.default_rng(0))
    batch = {name: jnp.asarray(x)[None] for name, x in rows.items()}
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, 5, 300)), jnp.float32)
    scores = jnp.ones((1, 22))

    def loss(logits, weight):
        objective = ReplacedTokens(ByteTokenizer(), 22, mask_rate=0.25, replaced_weight=weight)
        return objective.loss(Scorer(logits, scores), batch).loss

    with_it, without = (jax.grad(loss)(logits, weight) for weight in (50.0, 0.0))
    np.testing.assert_array_equal(with_it, without)
