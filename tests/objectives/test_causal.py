import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lm.data.packing import windows
from lm.data.store import Manifest, TokenStore
from lm.objectives.causal import Causal

# Documents of 3, 4 and 2 tokens, then padding; L + 1 = 12.
SEGMENTS = np.repeat([1, 2, 3, 0], [3, 4, 2, 3]).astype(np.int32)
EXAMPLE = {
    "tokens": np.arange(10, 22, dtype=np.int32),
    "segment_ids": SEGMENTS,
    "positions": np.array([0, 1, 2, 0, 1, 2, 3, 0, 1, 0, 0, 0], np.int32),
    "weights": np.array([1, 1, 0, 1, 1, 1, 0, 1, 0, 0, 0], np.float32),
}


def features(isolate=True):
    return Causal(isolate).features(EXAMPLE, np.random.default_rng(0))


def test_every_token_predicts_the_next_one():
    found = features()
    np.testing.assert_array_equal(found["inputs"], range(10, 21))
    np.testing.assert_array_equal(found["targets"], range(11, 22))
    for name in ("weights", "segment_ids", "positions"):
        np.testing.assert_array_equal(found[name], EXAMPLE[name][:11])


@pytest.mark.parametrize("delimiter", [None, 0])
def test_no_target_lies_in_the_next_document(delimiter):
    """Whole way from a store of documents 1 2 3 | 4 5 6 7 | 8 9, delimiters before each or none."""
    documents = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
    if delimiter is not None:
        documents = [[delimiter, *document] for document in documents]
    tokens = np.concatenate(documents)
    manifest = Manifest(1, "memory", "", "", "uint32", len(tokens), 3, 0, 0, delimiter)
    offsets = np.cumsum([0, *map(len, documents)])
    examples = windows(TokenStore(Path(), manifest, tokens, offsets), 16, 16, True, False)
    found = Causal(True).features(examples[0], np.random.default_rng(0))
    pairs = [
        (int(here), int(there))
        for here, there, weight in zip(
            found["inputs"], found["targets"], found["weights"], strict=True
        )
        if weight
    ]
    inside = [pair for document in documents for pair in itertools.pairwise(document)]
    ends = [] if delimiter is None else [(3, 0), (7, 0)]
    assert sorted(pairs) == sorted(inside + ends)


def test_without_isolation_the_model_gets_neither_segments_nor_positions():
    assert set(features(isolate=False)) == {"inputs", "targets", "weights"}


def test_features_have_fixed_shapes_and_types():
    for name, values in features().items():
        assert values.shape == (11,)
        assert values.dtype == (np.float32 if name == "weights" else np.int32)


@pytest.mark.parametrize("isolate", [True, False])
def test_loss_is_the_sum_of_the_nats_of_weighted_targets(isolate):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 11, 24))
    logits[0, 1, 12] = 20  # one sure hit
    batch = {name: jnp.stack([values, values[::-1]]) for name, values in features(isolate).items()}
    seen = []

    def apply(*inputs):
        seen.append(inputs)
        return jnp.asarray(logits, jnp.float32)

    sums = Causal(isolate).loss(apply, batch)
    ((inputs, positions, segments),) = seen
    assert inputs is batch["inputs"]
    assert positions is batch.get("positions")
    assert segments is batch.get("segment_ids")
    targets, weights = np.asarray(batch["targets"]), np.asarray(batch["weights"])
    log_probabilities = scipy.special.log_softmax(logits, axis=-1)
    loss = right = 0.0
    for row, at in np.ndindex(targets.shape):
        loss -= weights[row, at] * log_probabilities[row, at, targets[row, at]]
        right += weights[row, at] * (logits[row, at].argmax() == targets[row, at])
    assert float(sums.loss) == pytest.approx(loss, rel=1e-5)
    assert float(sums.weight) == weights.sum()
    assert float(sums.metrics["accuracy"]) == right > 0
