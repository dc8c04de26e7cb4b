"""Engine of models that cannot be paged: replies are those of sampling and of beam search."""

from __future__ import annotations

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


def test_a_seed_gives_the_sample_of_sample_steps_whatever_else_runs(lstm):
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


def test_cancelled_requests_say_nothing_more(lstm):
    engine, _, params = lstm
    first, second = (engine.add(GenerationRequest((1, 2), 7)) for _ in range(2))
    assert {one.request for one in engine.step()} == {first, second}
    engine.cancel(first)
    engine.update(params)
    third = engine.add(GenerationRequest((1, 2), 2))
    seen = set()
    while progress := engine.step():
        seen |= {one.request for one in progress}
    assert seen == {second, third}
    assert engine.statistics().n_running == engine.statistics().n_waiting == 0


def test_what_it_does_not_have_is_refused(lstm):
    engine, *_ = lstm
    for change in ({"min_p": 0.5}, {"logit_bias": {1: 2.0}}, {"top_logprobs": 0}):
        with pytest.raises(UserError, match="lstm is served without"):
            engine.add(GenerationRequest((1,), 2, **change))
    with pytest.raises(UserError, match="99"):
        engine.add(GenerationRequest((99,), 2))


def test_an_encoder_decoder_writes_its_best_hypotheses(make_experiment):
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
