"""Loss, perplexities and bits per byte over a whole split."""

import math
import threading
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import scipy.special

from lm.evaluation.loss import evaluate_loss
from lm.evaluation.task import predict
from lm.experiment import build_with_data


@pytest.fixture
def make_evaluation(make_kind):
    """Evaluate a fresh model of a kind: experiment, parameters, batches, stores and figures."""

    def make(kind, max_batches=0, **changes):
        config = make_kind(kind, model__init_std=0.3, data__validation_fraction=0.3, **changes)
        experiment, dataset = build_with_data(config, jax.devices()[:1])
        params = experiment.init_state().params
        batches = experiment.evaluation_batches(dataset.validation)
        found = evaluate_loss(experiment, params, batches, dataset.validation, max_batches)
        return experiment, params, batches, dataset.validation, found

    return make


def nats_of(experiment, params, tokens):
    """Of every token but the first, given all before it."""
    model = experiment.model.clone(config=replace(experiment.model.config, carry=False))
    logits = jax.jit(model.apply)({"params": params}, tokens[None, :-1])[0]
    scores = scipy.special.log_softmax(np.float64(logits), axis=-1)
    return -np.take_along_axis(scores, tokens[1:, None], axis=-1)[:, 0]


@pytest.mark.parametrize("together", [1, 3])
def test_state_is_carried_through_the_whole_text(make_evaluation, together):
    """As if each row of the batches were one long sequence."""
    experiment, params, batches, (store,), found = make_evaluation(
        "causal lstm", train__steps_per_dispatch=together, eval__batch_size=2
    )
    tokens, length = np.asarray(store.tokens, np.int64), len(batches) * 16
    parts = [tokens[: length + 1], tokens[length:]]
    nats = np.concatenate([nats_of(experiment, params, part) for part in parts])
    assert found["targets"] == len(nats) == len(tokens) - 1
    assert found["loss"] == pytest.approx(nats.mean(), rel=1e-5)


def test_perplexities_and_bits_are_of_all_nats(make_evaluation):
    *_, (store,), found = make_evaluation("causal decoder")
    nats = found["loss"] * found["targets"]
    text_bytes, words = store.manifest.n_bytes, store.manifest.n_words
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / words))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes)
    assert 0 <= found["accuracy"] <= 1


def test_perplexity_ignores_label_smoothing(make_evaluation):
    plain = make_evaluation("causal decoder")[-1]
    smooth = make_evaluation("causal decoder", objective__label_smoothing=0.2)[-1]
    assert smooth["loss"] != pytest.approx(plain["loss"], rel=1e-3)
    assert smooth["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-5)


def test_partial_evaluation_has_no_figure_per_word_or_byte(make_evaluation):
    found = make_evaluation("causal decoder", max_batches=1)[-1]
    assert set(found) == {"loss", "accuracy", "perplexity", "targets"}


def test_step_that_fails_ends_the_thread_that_prepares_batches(make_kind):
    """A process waits for that thread, and its traceback keeps the loop."""
    config = make_kind("causal decoder", data__validation_fraction=0.3, eval__batch_size=1)
    experiment, dataset = build_with_data(config, jax.devices()[:1])

    def fail(*args):
        raise RuntimeError("no memory")

    names = "config", "init_carry", "batch_sharding", "evaluation_batches"
    same = {name: getattr(experiment, name) for name in names}
    failing = SimpleNamespace(**same, eval_steps=fail, predict_steps=fail)
    batches, stores = experiment.evaluation_batches(dataset.validation), dataset.validation
    assert len(batches) > 9
    for step in (
        lambda: evaluate_loss(failing, None, batches, stores),
        lambda: predict(failing, None, stores),
    ):
        with pytest.raises(RuntimeError, match="no memory") as error:
            step()
        assert error.tb is not None
        assert not [t for t in threading.enumerate() if t.name.startswith("lm-batches")]
