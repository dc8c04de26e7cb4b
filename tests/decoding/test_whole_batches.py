"""Engine for models that cannot be paged: replies equal those of sampling and beam search."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lm.decoding.batch import decode_best
from lm.decoding.beam import BeamOptions
from lm.decoding.controls import Controls
from lm.decoding.engine.choice import open_engine
from lm.decoding.engine.requests import LENGTH, GenerationRequest
from lm.decoding.engine.sizes import EngineOptions
from lm.decoding.engine.whole_batches import WholeBatchEngine
from lm.decoding.sampling import Sampling, sample_steps
from lm.decoding.text_limits import TextLimits
from lm.decoding.weights import prepare
from lm.errors import UserError


def run(engine, *requests):
    """Token ids and the reason of the end of each reply."""
    numbers = [engine.add(request) for request in requests]
    tokens, finishes = {n: [] for n in numbers}, {}
    while progress := engine.step():
        for one in progress:
            tokens[one.request] += [token.id for token in one.tokens]
            finishes[one.request] = one.finish
    return [(tokens[n], finishes[n]) for n in numbers]


@pytest.fixture
def lstm(make_experiment):
    experiment, params, _ = make_experiment("lstm")
    engine = open_engine(experiment, params, EngineOptions(n_rows=4))
    assert isinstance(engine, WholeBatchEngine)
    return engine, experiment, params


def test_seed_gives_the_sample_of_sample_steps_whatever_else_runs(lstm):
    engine, experiment, params = lstm
    request = GenerationRequest((1, 4, 5), 6, seed=3, number=1)
    others = [GenerationRequest((1, 3), 4), GenerationRequest((1,), 7), GenerationRequest((2,), 5)]
    (alone,) = run(engine, request)
    assert run(engine, *others[:2], request, others[2])[2] == alone
    experiment, params = prepare(experiment, params)
    steps = sample_steps(
        experiment.model, params, [[1, 4, 5]], 6, Sampling(), 3, Controls(), numbers=[1]
    )
    assert alone == (np.stack(list(steps))[:, 0].tolist(), LENGTH)
    lengths = [len(tokens) for tokens, _ in run(engine, *others)]
    assert lengths == [4, 7, 5]


def test_cancelled_requests_return_no_progress(lstm):
    engine, *_ = lstm
    first, second = (engine.add(GenerationRequest((1, 2), 7)) for _ in range(2))
    assert {one.request for one in engine.step()} == {first, second}
    engine.cancel(first)
    third = engine.add(GenerationRequest((1, 2), 2))
    seen = set()
    while progress := engine.step():
        seen |= {one.request for one in progress}
    assert seen == {second, third}
    assert engine.statistics().n_running == engine.statistics().n_waiting == 0


def test_unsupported_features_are_rejected(lstm):
    engine, *_ = lstm
    for change, word in (({"adapter": "x"}, "x"), ({"prompt": (99,)}, "99"), ({"min_p": 2}, "2")):
        with pytest.raises(UserError, match=word):
            engine.add(GenerationRequest(**{"prompt": (1,), "max_new_tokens": 2, **change}))


def test_update_is_of_later_requests_alone(lstm):
    engine, experiment, params = lstm
    other = jax.tree.map(lambda x: -x, params)
    requests = [GenerationRequest((1, 4), 5, 0.0, seed=i) for i in range(2)]
    expected = [
        run(WholeBatchEngine(experiment, each, 4), requests[0])[0] for each in (params, other)
    ]
    numbers = [engine.add(request) for request in requests]
    engine.update(other)
    numbers.append(engine.add(requests[0]))
    found = {number: [] for number in numbers}
    while progress := engine.step():
        for one in progress:
            found[one.request] += [token.id for token in one.tokens]
    assert [*found.values()] == [expected[0][0], expected[0][0], expected[1][0]]
    assert expected[0] != expected[1]


class Stuck:
    """Limits that allow the token 7 twice, then nothing."""

    end_ids = (2,)
    masked = TextLimits.masked

    def allowed(self, n_ids, written_BT, n):
        return np.array([[int(n) < 2 and token == 7 for token in range(n_ids)]] * len(written_BT))


@pytest.mark.parametrize("family", ["lstm", "encoder_decoder"])
def test_each_request_has_options_of_its_own(make_experiment, log_probabilities, family):
    """Log-probabilities are the model's; bias, penalties, filters and limits decide the tokens."""
    experiment, params, tokenizer = make_experiment(family)
    object.__setattr__(experiment, "tokenizer", tokenizer)
    engine = open_engine(experiment, params, EngineOptions(n_rows=8))
    prompt, two = (3, 4, 2), {5: 2000.0, 6: 1900.0}
    requests = [
        GenerationRequest(prompt, 5, **options)
        for options in (
            {"temperature": 0, "top_logprobs": 8},
            {"temperature": 0, "logit_bias": two, "presence_penalty": 200, "top_logprobs": 0},
            {"temperature": 0, "logit_bias": two, "frequency_penalty": 200},
            {"min_p": 1},
            {"limits": Stuck(), "end_ids": (2,)},
        )
    ]
    numbers = {engine.add(request): i for i, request in enumerate(requests)}
    replies, ends = [[] for _ in requests], {}
    while progress := engine.step():
        for one in progress:
            replies[numbers[one.request]] += one.tokens
            ends[numbers[one.request]] = one.finish
    ids = [[token.id for token in tokens] for tokens in replies]
    assert ids[1:3] == [[5, 6, 5, 5, 5], [5, 6, 5, 6, 5]]
    assert ids[3] == ids[0]
    assert (ids[4], ends[4]) == ([7, 7], LENGTH)
    for tokens, reply in zip(replies[:2], ids, strict=False):
        (expected,) = log_probabilities(experiment, params, list(prompt), [reply])
        assert [token.logprob for token in tokens] == pytest.approx(expected, abs=1e-4)
    assert [max(token.top, key=lambda one: one[1])[0] for token in replies[0]] == ids[0]
    searched = GenerationRequest(prompt, 5, 0.0, end_ids=(2,), limits=Stuck())
    assert run(engine, searched) == [([7, 7], LENGTH)]


def test_encoder_decoder_writes_its_best_hypotheses(make_experiment):
    experiment, params, tokenizer = make_experiment("encoder_decoder", decode__beam_size=2)
    object.__setattr__(experiment, "tokenizer", tokenizer)
    engine = open_engine(experiment, params, EngineOptions(n_rows=4))
    options = BeamOptions(2, 6, controls=Controls((2,)))
    sources = [[3, 4, 2], [5, 2]]
    best = decode_best(experiment, params, tokenizer, sources, options)
    requests = [
        GenerationRequest(tuple(source), 6, 0.0, end_ids=(2,), number=number)
        for source in sources
        for number in range(2)
    ]
    found = [tokens for tokens, _ in run(engine, *requests)]
    assert found[::2] == best
    assert found[0] != found[1]
    with pytest.raises(UserError, match="beam size"):
        engine.add(GenerationRequest((3, 2), 6, 0.0, number=2))
