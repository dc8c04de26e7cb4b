import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lm.objectives.causal import Causal

# Documents of 3, 4 and 2 tokens, then padding; L + 1 = 12.
SEGMENTS = np.repeat([1, 2, 3, 0], [3, 4, 2, 3]).astype(np.int32)
EXAMPLE = {
    "tokens": np.arange(10, 22, dtype=np.int32),
    "segment_ids": SEGMENTS,
    "positions": np.array([0, 1, 2, 0, 1, 2, 3, 0, 1, 0, 0, 0], np.int32),
    "weights": np.array([1, 1, 0, 1, 1, 1, 0, 1, 0, 0, 0], np.float32),
}


def features(isolate=True, carry=False, **example):
    objective = Causal(11, isolate_documents=isolate, carry=carry)
    return objective.features(EXAMPLE | example, np.random.default_rng(0))


def test_every_token_predicts_the_next_one():
    found = features()
    np.testing.assert_array_equal(found["inputs"], range(10, 21))
    np.testing.assert_array_equal(found["targets"], range(11, 22))
    for name in ("weights", "segment_ids", "positions"):
        np.testing.assert_array_equal(found[name], EXAMPLE[name][:11])


@pytest.mark.parametrize("delimiter", [None, 0])
def test_no_target_is_in_the_next_document(make_store, delimiter):
    """Whole way from a store of documents 1 2 3 | 4 5 6 7 | 8 9, delimiters before each or none."""
    documents = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
    if delimiter is not None:
        documents = [[delimiter, *document] for document in documents]
    objective = Causal(16)
    examples = objective.examples(make_store(documents, delimiter), training=False)
    found = objective.features(examples[0], np.random.default_rng(0))
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


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("carry", [True, False])
def test_features_have_the_stated_shapes(isolate, carry):
    found = features(isolate, carry)
    stated = Causal(11, isolate_documents=isolate, carry=carry).shapes
    assert {name: (x.shape, x.dtype.name) for name, x in found.items()} == stated


def test_fresh_rows_are_marked_for_models_with_carried_state():
    assert "fresh" not in features(fresh=1)
    assert features(carry=True, fresh=1)["fresh"] == 1
    assert features(carry=True)["fresh"] == 0


@pytest.mark.parametrize(("stride", "starts"), [(0, [0, 11, 22]), (4, [0, 4, 8, 12, 16, 20, 24])])
def test_stride_sets_where_training_windows_start_and_adjoining_ones_are_evaluated(
    make_store, stride, starts
):
    store, objective = make_store([np.arange(39)]), Causal(11, stride=stride)
    examples = objective.examples(store, training=True)
    assert [examples[i]["tokens"][0] for i in range(len(examples))] == starts
    examples = objective.examples(store, training=False)
    assert [examples[i]["tokens"][0] for i in range(len(examples))] == [0, 11, 22, 33]


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("isolate", [True, False])
def test_loss_is_the_sum_of_the_nats_of_weighted_targets(make_scorer, isolate, carry):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 11, 24))
    logits[0, 1, 12] = 20  # one sure hit
    found = features(isolate, carry)
    batch = {name: jnp.stack([values, np.flip(values)]) for name, values in found.items()}
    model = make_scorer(logits)
    sums = Causal(11, isolate_documents=isolate, carry=carry).loss(model, batch)
    (((inputs, positions, segments), named),) = model.calls
    assert named == ({"fresh_B": batch["fresh"]} if carry else {})
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
    assert float(sums.metrics["nll"]) == pytest.approx(loss, rel=1e-5)
