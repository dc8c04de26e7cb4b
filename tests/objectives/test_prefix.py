from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.dot_product_attention import AttentionMask
from lm.objectives.prefix import Prefix

# Documents of 3, 5 and 2 tokens, then padding; L + 1 = 13.
DOCUMENTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10]]
LENGTH = 12


@pytest.fixture
def features(make_store):
    def make(seed=0, isolate=True):
        objective = Prefix(LENGTH, isolate_documents=isolate)
        example = objective.examples(make_store(DOCUMENTS), training=False)[0]
        return objective.features(example, np.random.default_rng(seed))

    return make


def prefix_lengths(found):
    """How many tokens of each segment belong to its prefix, which must be its first ones."""
    lengths = []
    for segment in range(1, found["segment_ids"].max() + 1):
        prefix = found["prefix"][found["segment_ids"] == segment]
        assert sorted(prefix, reverse=True) == prefix.tolist()
        lengths.append(int(prefix.sum()))
    return tuple(lengths)


def test_every_document_has_a_prefix_of_its_own_and_all_lengths_are_equally_likely(features):
    seen = Counter(prefix_lengths(features(seed)) for seed in range(3000))
    assert set(seen) == {(a, b, c) for a in (1, 2, 3) for b in (1, 2, 3, 4, 5) for c in (1, 2)}
    for count in seen.values():
        assert count == pytest.approx(100, abs=45)  # 4.5 standard deviations


def test_without_isolation_the_window_has_one_prefix(features):
    seen = Counter(prefix_lengths(features(seed, isolate=False)) for seed in range(1000))
    assert set(seen) == {(n,) for n in range(1, 11)}
    assert set(features(isolate=False)["segment_ids"]) == {0, 1}


@pytest.mark.parametrize("isolate", [True, False])
def test_every_token_after_a_prefix_is_predicted_from_what_does_not_show_it(features, isolate):
    for seed in range(20):
        found = features(seed, isolate)
        segments, prefix = (jnp.asarray(found[name])[None] for name in ("segment_ids", "prefix"))
        sees = np.asarray(
            AttentionMask(True, segments, prefix_BS=prefix).materialize(LENGTH, LENGTH)
        )[0]
        predicted = set()
        for at in np.flatnonzero(found["weights"]):
            assert not sees[at, at + 1]
            predicted.add(int(found["targets"][at]))
        tokens = set(range(1, 11))
        assert predicted == tokens - set(found["inputs"][found["prefix"] == 1].tolist())


def test_padding_belongs_to_no_prefix(features):
    found = features()
    assert found["segment_ids"][-2:].tolist() == found["prefix"][-2:].tolist() == [0, 0]


def test_features_have_the_stated_shapes_and_depend_on_the_generator_only(features):
    found = features()
    stated = Prefix(LENGTH).shapes
    assert {name: (x.shape, x.dtype.name) for name, x in found.items()} == stated
    for name, values in features().items():
        np.testing.assert_array_equal(values, found[name])
    assert any((features(seed)["prefix"] != found["prefix"]).any() for seed in range(9))


def test_loss_covers_the_rest_of_the_documents(features, make_scorer):
    batch = {name: jnp.asarray(x)[None] for name, x in features().items()}
    logits = np.random.default_rng(0).normal(size=(1, LENGTH, 16))
    model = make_scorer(logits)
    sums = Prefix(LENGTH).loss(model, batch)
    ((inputs, named),) = model.calls
    for given, name in zip(inputs, ("inputs", "positions", "segment_ids"), strict=True):
        assert given is batch[name]
    assert named["prefix_BL"] is batch["prefix"]
    nats = 0.0
    for at in np.flatnonzero(batch["weights"][0]):
        scores = logits[0, at]
        nats += np.log(np.exp(scores).sum()) - scores[batch["targets"][0, at]]
    assert float(sums.loss) == pytest.approx(nats, rel=1e-5)
    assert 0 < float(sums.weight) < 9
