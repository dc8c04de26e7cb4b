from itertools import pairwise

import jax
import numpy as np
import pytest

from lm.decoding import batch
from lm.decoding.batch import decode_best, sample_batches, search_batches
from lm.decoding.beam import BeamOptions
from lm.decoding.controls import Controls
from lm.decoding.engine.choice import open_engine
from lm.decoding.engine.requests import GenerationRequest
from lm.decoding.engine.sizes import EngineOptions
from lm.decoding.sampling import Sampling
from lm.errors import UserError
from lm.evaluation import likelihood
from lm.evaluation.likelihood import Request

RNG = np.random.default_rng(0)
INPUTS = [[1, *RNG.integers(3, 8, n)] for n in (3, 8, 1, 7, 2, 2, 5, 9, 4)]
FAMILIES = ("encoder_decoder", "decoder")


def texts(found):
    return [[output.tokens for output in outputs] for outputs in found]


@pytest.fixture(params=FAMILIES)
def made(request, make_experiment, monkeypatch):
    """With batches of 2, windows of 4."""
    monkeypatch.setattr(batch, "_BATCHES_SORTED", 2)
    return make_experiment(request.param, decode__batch_size=2, decode__beam_size=2)


def test_outputs_come_in_the_order_of_inputs(made):
    experiment, params, tokenizer = made
    search = BeamOptions(2, 6, 0.6, Controls())
    one_by_one = [decode_best(experiment, params, tokenizer, [x], search)[0] for x in INPUTS]
    assert decode_best(experiment, params, tokenizer, INPUTS, search) == one_by_one
    assert len(set(map(tuple, one_by_one))) > 3


def test_layers_on_several_stages_decode_equally(make_experiment):
    experiment, params, tokenizer = make_experiment("encoder_decoder")
    staged, *_ = make_experiment("encoder_decoder", 2, parallel__mesh__stage=2)
    placed = jax.device_put(params, staged.state_sharding.params)
    search = BeamOptions(2, 6, 0.6, Controls())
    expected = decode_best(experiment, params, tokenizer, INPUTS, search)
    assert decode_best(staged, placed, tokenizer, INPUTS, search) == expected


def test_later_start_continues_with_the_same_batches(made, monkeypatch):
    """In other batches rounding could decide otherwise between almost equal hypotheses."""
    experiment, params, tokenizer = made
    search, batches, counts = BeamOptions.from_config(experiment.config, tokenizer), [], []
    search_batch = batch._search_batch

    def recorded(*args):
        batches.append(str(args[4]))
        return search_batch(*args)

    monkeypatch.setattr(batch, "_search_batch", recorded)
    whole = list(search_batches(experiment, params, tokenizer, INPUTS, search))
    all_batches = set(batches)
    for start in (1, 4, 6, 9):
        batches.clear()
        counts.clear()
        rest = search_batches(experiment, params, tokenizer, INPUTS, search, start, counts.append)
        assert list(rest) == whole[start:]
        assert set(batches) <= all_batches
        assert sum(counts) == len(INPUTS) - start


def test_devices_share_the_inputs(make_experiment):
    for family in FAMILIES:
        found = []
        for n_devices in (1, 8):
            made = make_experiment(family, n_devices=n_devices, decode__beam_size=3)
            options = BeamOptions.from_config(made[0].config, made[2])
            found.append(decode_best(*made, INPUTS, options))
        assert found[0] == found[1]


def test_prompt_and_continuation_fit_the_context(make_experiment):
    experiment, params, tokenizer = make_experiment("decoder")
    search = BeamOptions(2, 100, 0.0, Controls())
    found = decode_best(experiment, params, tokenizer, INPUTS, search)
    assert [len(x) + len(y) for x, y in zip(INPUTS, found, strict=True)] == [12] * len(INPUTS)
    with pytest.raises(UserError, match="prompt 2 has 12 tokens"):
        decode_best(experiment, params, tokenizer, [[1], [3] * 12], search)


def test_non_learned_positions_have_no_limit(make_experiment):
    experiment, params, tokenizer = make_experiment("decoder", model__positions="rotary")
    search = BeamOptions(2, 20, 0.0, Controls())
    assert len(decode_best(experiment, params, tokenizer, [[1] * 13], search)[0]) == 20


def test_whole_prompt_is_a_prefix(make_experiment):
    experiment, params, tokenizer = make_experiment("decoder", objective__name="prefix")
    found = decode_best(experiment, params, tokenizer, INPUTS, BeamOptions(1, 2, 0.0, Controls()))
    apply = jax.jit(experiment.model.apply)
    for prompt, output in zip(INPUTS, found, strict=True):
        for n in range(2):
            seen = len(prompt) + n
            tokens = np.array([[*prompt, *output, *[0] * 12][:12]])
            prefix = (np.arange(12) < len(prompt)).astype(int)[None]
            logits = apply({"params": params}, tokens, prefix_BL=prefix)
            assert output[n] == logits[0, seen - 1].argmax()


def sampled(made, prompts, start=0, **options):
    experiment, params, _ = made
    found = sample_batches(experiment, params, prompts, Sampling(), 3, Controls(**options), start)
    return texts(found)


def test_samples_depend_on_prompt_number_and_seed_only(make_experiment, monkeypatch):
    monkeypatch.setattr(batch, "_BATCHES_SORTED", 2)
    made = make_experiment("decoder", decode__batch_size=2)
    whole = sampled(made, INPUTS)
    assert sampled(made, INPUTS, 5) == whole[5:]
    same = sampled(made, [INPUTS[0]] * 9)
    assert same[0] == whole[0]
    assert len(set(map(str, same))) > 4


def test_samples_obey_controls(make_experiment):
    made = make_experiment("decoder", decode__batch_size=9)
    lengths = [len(tokens) for (tokens,) in sampled(made, INPUTS, end_ids=(2,), min_length=2)]
    assert min(lengths) >= 2
    assert min(lengths) < 6
    freely = [tokens for (tokens,) in sampled(made, INPUTS)]
    banned = ((freely[0][0],), tuple(freely[1][:2]))
    for (tokens,) in sampled(made, INPUTS, banned=banned):
        assert banned[0][0] not in tokens
        assert banned[1] not in pairwise(tokens)
    (penalised,) = sampled(made, INPUTS[:1], repetition_penalty=1e6)
    assert len(set(penalised[0][:3])) == 3


@pytest.mark.parametrize("family", ["encoder_decoder", "lstm_encoder_decoder"])
def test_target_continues_after_its_prefix(make_experiment, log_probabilities, family):
    changes = {"decode__beam_size": 2, "data__target_prefix": "<b>,<a>"}
    experiment, params, tokenizer = make_experiment(family, **changes)
    options = BeamOptions(2, 20, 0.0, Controls())
    (best, second), *_ = search_batches(experiment, params, tokenizer, [[3, 5, 2]], options)
    # The positions of a Transformer are learned: 12 of them hold the start and the prefix too.
    assert len(best.tokens) == (10 if family == "encoder_decoder" else 20)
    outputs = [best.tokens, second.tokens]
    scores_N = log_probabilities(experiment, params, [3, 5, 2], outputs).sum(1)
    assert [best.score, second.score] == pytest.approx(scores_N, abs=1e-4)

    object.__setattr__(experiment, "tokenizer", tokenizer)
    engine = open_engine(experiment, params, EngineOptions(n_rows=2))
    engine.add(GenerationRequest((3, 5, 2), 30, 1e-5, seed=1))
    greedy = []
    while progress := engine.step():
        greedy += [token.id for one in progress for token in one.tokens]
    (found,) = decode_best(
        experiment, params, tokenizer, [[3, 5, 2]], BeamOptions(1, 30, 0.0, Controls())
    )
    assert greedy == found
    score = likelihood.score(
        experiment, params, tokenizer, [Request(np.array([3, 5, 2]), np.array(best.tokens[:5]))]
    )[0]
    assert score.log_likelihoods.sum() == pytest.approx(
        log_probabilities(experiment, params, [3, 5, 2], [best.tokens[:5]]).sum(), abs=1e-4
    )
