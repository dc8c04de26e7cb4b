"""The paged engine against uncached decoding, and its replies under load."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.stats

from lm.decoding.controls import START, Controls
from lm.decoding.engine.engine import PagedEngine
from lm.decoding.engine.requests import GenerationRequest
from lm.decoding.engine.rows import ServedRow
from lm.decoding.engine.sizes import EngineOptions
from lm.decoding.sampling import Sampling, sample_steps
from lm.errors import UserError

V, CONTEXT = 24, 64
OPTIONS = EngineOptions(n_rows=3, context=CONTEXT, page_size=4, chunk=16, steps_per_dispatch=3)
RNG = np.random.default_rng(0)
PROMPTS = [tuple(RNG.integers(3, V, n).tolist()) for n in (5, 1, 33, 8, 17, 40)]
ROTARY = {"model__positions": "rotary", "model__n_kv_heads": 1, "model__attention_softcap": 4.0}

SINKS = {  # gpt-oss, with Llama 4's chunks and layers without positions
    "model__attention_sinks": True,
    "model__window": 6,
    "model__window_chunks": True,
    "model__global_every": 2,
    "model__nope_every": 2,
    "model__nope_temperature": 0.5,
    "model__nope_temperature_length": 8,
    "model__rope_norm": True,
    "model__rope_fraction": 0.5,
    "model__n_experts": 3,
    "model__router_bias": True,
    "model__expert_weights_input": True,
    "model__residual_multiplier": 0.5,
}
OLMO = {  # OLMo 3, with Qwen2-MoE's experts
    "model__norm_placement": "output",
    "model__qk_norm": True,
    "model__qk_norm_over": "all",
    "model__rope_scaling": "yarn",
    "model__rope_high_frequency": 32.0,
    "model__rope_theta_local": 100.0,
    "model__rope_factor": 4.0,
    "model__rope_original_length": 8,
    "model__n_experts": 3,
    "model__expert_weights": "probability",
    "model__shared_expert_d_ff": 20,
    "model__shared_expert_gate": True,
}


def run(engine, requests, others=()):
    """Return tokens and finish reason of each request; `others` are served concurrently."""
    numbers, others = [], list(others)
    for request in requests:
        numbers.append(engine.add(request))
        if others:
            engine.add(others.pop())
    for other in others:
        engine.add(other)
    tokens, ends = {n: [] for n in numbers}, {}
    while found := engine.step():
        for progress in found:
            tokens.get(progress.request, []).extend(progress.tokens)
            if progress.finish:
                ends[progress.request] = progress.finish
    return [(tokens[n], ends[n]) for n in numbers]


@pytest.fixture
def make_engine(make_experiment):
    def make(n_devices=1, options=OPTIONS, **changes):
        sizes = {"model__vocab_size": V, "data__sequence_length": CONTEXT}
        experiment, params, _ = make_experiment("decoder", n_devices, **{**sizes, **changes})
        return PagedEngine(experiment, params, options), experiment, params

    return make


def sampled(experiment, params, prompts, n, seed, temperature=0.8, end_ids=()):
    """Tokens by the loop of `lm generate`."""
    sampling, controls = Sampling(temperature), Controls(end_ids)
    steps = [
        np.full(len(prompts), -1),
        *sample_steps(experiment.model, params, prompts, n, sampling, seed, controls),
    ]
    return [[int(token) for token in row if token >= 0] for row in np.stack(steps, 1)]


@pytest.mark.parametrize(
    ("n_devices", "changes"),
    [
        (1, {}),
        (1, ROTARY | {"model__window": 6, "model__global_every": 2} | OLMO),
        (1, ROTARY | SINKS),
        (1, {"model__positions": "alibi", "decode__cache": "int8"}),
        (1, {"model__positions": "relative", "model__n_experts": 4}),
        (
            2,
            ROTARY
            | {"parallel__preset": "custom", "parallel__mesh__data": 1, "parallel__mesh__tensor": 2}
            | {"model__mixer": "mla", "model__n_kv_heads": 0, "model__kv_lora_rank": 6}
            | {"model__qk_nope_head_dim": 4, "model__v_head_dim": 5},
        ),
        (
            4,
            ROTARY
            | {"parallel__preset": "custom", "parallel__mesh__data": 2}
            | {"parallel__mesh__tensor": 2, "model__n_kv_heads": 2},
        ),
    ],
    ids=[
        "learned",
        "rotary, window",
        "sinks, chunks",
        "alibi, int8 cache",
        "relative, experts",
        "mla, mesh",
        "mesh",
    ],
)
def test_replies_match_generate(make_engine, n_devices, changes):
    """Rows come and go, prompts are longer and shorter than a chunk: the tokens are the same."""
    engine, experiment, params = make_engine(n_devices, **changes)
    requests = [
        GenerationRequest(prompt, 20, temperature=0.8, seed=7, number=i, end_ids=(2,))
        for i, prompt in enumerate(PROMPTS)
    ]
    replies = run(engine, requests)
    if changes.get("decode__cache") == "int8":
        from lm.decoding.weights import prepare

        experiment, params = prepare(experiment, params)
    expected = sampled(experiment, params, PROMPTS, 20, 7, end_ids=(2,))
    assert [[token.id for token in tokens] for tokens, _ in replies] == expected
    for (_, finish), tokens in zip(replies, expected, strict=True):
        assert finish == ("length" if len(tokens) == 20 else "stop")


def test_reply_with_a_seed_depends_on_nothing_else(make_engine):
    """Tokens and log-probabilities are bitwise equal, alone and beside any others."""
    engine, experiment, params = make_engine(**ROTARY)
    seeded = [
        GenerationRequest(prompt, 12, seed=i, top_p=0.9, top_k=12, top_logprobs=3)
        for i, prompt in enumerate(PROMPTS)
    ]
    alone = [run(PagedEngine(experiment, params, OPTIONS), [one])[0] for one in seeded]
    others = [
        GenerationRequest(
            tuple(RNG.integers(3, V, n).tolist()), m, seed=seed, frequency_penalty=n % 3 / 2
        )
        for n, m, seed in zip(
            RNG.integers(1, 40, 12), RNG.integers(1, 24, 12), [None, 5] * 6, strict=True
        )
    ]
    assert run(engine, seeded, others) == alone
    # Now the pages of all these prompts, of seeded and other requests, are in the cache.
    unseeded = [dataclasses.replace(one, seed=None) for one in seeded]
    assert run(engine, seeded[::-1], [*unseeded, *others[::-1]])[::-1] == alone
    assert engine.statistics().n_reused_tokens > 0


def test_update_is_of_later_requests_alone(make_engine):
    """Waiting requests keep the parameters at the time they were added."""
    engine, experiment, params = make_engine(**ROTARY)
    requests = [GenerationRequest(prompt, 5, seed=1) for prompt in PROMPTS]
    other = jax.tree.map(lambda x: x * 0.5, params)
    new = PagedEngine(experiment, other, OPTIONS)
    expected = run(engine, requests), run(new, requests)
    numbers = [engine.add(request) for request in requests]
    engine.update(params)  # of which no request is
    engine.update(other)
    numbers += [engine.add(request) for request in requests]
    found = {number: [] for number in numbers}
    while progress := engine.step():
        for one in progress:
            found[one.request] += one.tokens
    assert [*found.values()] == [tokens for replies in expected for tokens, _ in replies]
    assert expected[0] != expected[1]


def test_banned_sequences_may_begin_an_output():
    banned = (1,), (START, 2), (START, 3, 4), (5, 6), (9,)
    row = ServedRow(0, GenerationRequest((7,), 9, banned=banned), [], 0)
    for new, expected in (([], [1, 2]), ([3], [1, 4]), ([3, 5], [1, 6]), ([3, 5, 3], [1])):
        row.new = new
        assert np.flatnonzero(~row.allowed(8)).tolist() == expected


def test_speculation_with_masked_rows_is_bitwise_exact(make_engine):
    """A row with proposals keeps its program beside rows whose tokens are masked by the host."""
    options = dataclasses.replace(OPTIONS, n_proposed=3)
    engine, experiment, params = make_engine(options=options, **ROTARY)
    seeded = [GenerationRequest(p, 9, seed=i, top_logprobs=0) for i, p in enumerate(PROMPTS[:3])]
    masked = [dataclasses.replace(one, banned=((5, 5),)) for one in seeded]
    every = [*seeded, *masked]
    alone = [run(PagedEngine(experiment, params, options), [one])[0] for one in every]
    assert run(engine, seeded, masked) == alone[:3]
    assert run(engine, masked, seeded) == alone[3:]


def test_prefixes_are_read_once(make_engine):
    """A second prompt with the same beginning, or a conversation's next turn, reads the rest."""
    engine, experiment, params = make_engine(**ROTARY)
    prompt = PROMPTS[5]
    (first,) = run(engine, [GenerationRequest(prompt, 9, temperature=0)])
    turn = (*prompt, *(token.id for token in first[0]), 5, 6, 7)
    (second,) = run(engine, [GenerationRequest(turn, 6, temperature=0)])
    # 48 = 12 pages of 4: the prompt of 40 and 8 tokens of the reply, whose last has no keys yet.
    assert engine.statistics().n_reused_tokens == 48
    (expected,) = sampled(experiment, params, [turn], 6, 0, temperature=0)
    assert [token.id for token in second[0]] == expected
    engine.update(params)
    assert run(engine, [GenerationRequest(turn, 6, temperature=0)]) == [second]
    assert engine.statistics().n_reused_tokens == 48  # pages of other parameters are not used


def test_request_that_is_cancelled_frees_its_row_and_pages(make_engine):
    engine, *_ = make_engine()
    numbers = [engine.add(GenerationRequest(prompt, 20, seed=1)) for prompt in PROMPTS]
    engine.step()
    for number in numbers[:4]:
        engine.cancel(number)
    engine.cancel(numbers[0])
    found = []
    while progress := engine.step():
        found += progress
    assert {p.request for p in found} == set(numbers[4:])
    stats = engine.statistics()
    assert (stats.n_running, stats.n_waiting, stats.n_pages_used) == (0, 0, 0)


def test_requests_wait_for_free_pages(make_engine):
    """With pages for one row, requests are served one after the other, with the same replies."""
    requests = [GenerationRequest(prompt, 8, seed=3) for prompt in PROMPTS[:4]]
    small = dataclasses.replace(OPTIONS, n_pages=12)
    assert run(make_engine(options=small)[0], requests) == run(make_engine()[0], requests)
    with pytest.raises(UserError, match="the cache has 12 pages of 4"):
        make_engine(options=small)[0].add(GenerationRequest(PROMPTS[5], 20))


def test_log_probabilities_are_the_models(make_engine):
    """Those of the reply are before temperature and bias; those of the prompt are its own."""
    engine, experiment, params = make_engine()
    request = GenerationRequest(
        PROMPTS[0], 6, temperature=0, logit_bias={9: 4.0, 11: -1.5}, top_logprobs=4
    )
    ((tokens, _),) = run(engine, [request])
    text = [*PROMPTS[0], *(token.id for token in tokens)]
    logits = jax.jit(experiment.model.apply)({"params": params}, np.array([text]))
    logprobs = np.asarray(jax.nn.log_softmax(logits[0, :-1]))
    of_prompt = engine.prompt_logprobs(request)
    assert of_prompt[0].logprob is None
    for i, token in enumerate([*of_prompt[1:], *tokens]):
        best = np.argsort(-logprobs[i])[:4]
        assert token.id == text[i + 1]
        np.testing.assert_allclose(token.logprob, logprobs[i, token.id], atol=1e-4)
        assert [i for i, _ in token.top] == best.tolist()
        np.testing.assert_allclose([x for _, x in token.top], logprobs[i, best], atol=1e-4)
    biased = logprobs[len(PROMPTS[0]) - 1 :].copy()
    biased[:, 9] += 4
    biased[:, 11] -= 1.5
    assert [token.id for token in tokens] == biased.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": ()}, "empty"),
        ({"prompt": (V,)}, "exceeds the model's"),
        ({"prompt": (3,) * CONTEXT}, "the context holds"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_logprobs": 21}, "top_logprobs is 21"),
        ({"logit_bias": {V: 1.0}}, f"token id {V} does not exist"),
        ({"logit_bias": {0: float("inf")}}, "not finite"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_unservable_request_is_rejected(make_engine, options, words):
    with pytest.raises(UserError, match=words):
        make_engine()[0].add(GenerationRequest(**{"prompt": (3,), "max_new_tokens": 4, **options}))


@pytest.mark.parametrize("drafted", [False, True], ids=["look-up", "draft model"])
def test_proposals_change_no_token(make_engine, make_experiment, drafted):
    """Replies are those of decoding token by token, greedy or drawn; proposals save passes."""
    sizes = {"model__vocab_size": V, "data__sequence_length": CONTEXT}
    draft = make_experiment("decoder", 1, **sizes, **ROTARY)[:2] if drafted else None
    plain, experiment, params = make_engine(**ROTARY)
    if drafted:  # the model itself, a little off
        noisy = jax.tree.map(lambda x: x + np.float32(0.01), params)
        draft = experiment, noisy
    options = dataclasses.replace(OPTIONS, n_proposed=3)
    engine = PagedEngine(experiment, params, options, draft=draft)
    requests = [
        GenerationRequest((*prompt, 4, 5, 4, 5), 14, seed=i, end_ids=(2,), **how)
        for i, prompt in enumerate(PROMPTS)
        for how in ({"temperature": 0}, {"temperature": 0.7, "frequency_penalty": 0.3, "top_k": 9})
    ]
    replies, steps = [], []
    for each in (plain, engine):
        dispatched = []
        read = each._read

        def counted(read=read, dispatched=dispatched):
            found = read()
            dispatched.append(1)
            return found

        each._read = counted
        found = run(each, requests)
        replies.append([([token.id for token in tokens], finish) for tokens, finish in found])
        steps.append(len(dispatched))
    assert replies[0] == replies[1]
    assert steps[1] < steps[0]


def test_drawn_tokens_have_the_models_distribution(make_experiment):
    """Pairs of tokens that speculative decoding draws, against the product of the model's own."""
    experiment, params, _ = make_experiment("decoder", 1, data__sequence_length=16)
    sizes = EngineOptions(n_rows=32, context=16, page_size=4, chunk=4, n_proposed=2)
    engine = PagedEngine(experiment, params, sizes)
    requests = [
        GenerationRequest((3, 4, 3), 2, seed=5, number=i, temperature=1.5) for i in range(960)
    ]
    drawn = [tuple(token.id for token in tokens) for tokens, _ in run(engine, requests)]
    n_tokens = experiment.config.model.vocab_size
    texts = np.array([[3, 4, 3, first] for first in range(n_tokens)])
    logits = np.asarray(jax.jit(experiment.model.apply)({"params": params}, texts))
    first, second = (jax.nn.softmax(logits[:, at] / 1.5) for at in (2, 3))
    expected = np.asarray(first[0][:, None] * second, np.float64).ravel()
    expected *= len(drawn) / expected.sum()
    counts = np.bincount([a * n_tokens + b for a, b in drawn], minlength=n_tokens**2)
    rare = expected < 5
    kept = [*expected[~rare], expected[rare].sum()], [*counts[~rare], counts[rare].sum()]
    assert (
        scipy.stats.chisquare(kept[1], np.array(kept[0]) * sum(kept[1]) / sum(kept[0])).pvalue
        > 1e-3
    )


class Stuck:
    """Limits that allow the token 7 twice, then nothing but `ends`."""

    def __init__(self, *ends):
        self.ends = ends

    def allowed(self, n_ids, written_BT, n):
        return np.isin(np.arange(n_ids), self.ends if int(n) >= 2 else 7)[None]


def test_reply_cut_short_by_its_limits_is_incomplete(make_engine):
    """It contains only allowed tokens and finishes with "length"; others continue."""
    engine, *_ = make_engine()
    requests = [
        GenerationRequest(PROMPTS[0], 9, limits=Stuck(), end_ids=ends) for ends in ((2,), ())
    ]
    waits = {"min_new_tokens": 4, "end_ids": (2,)}  # for an end that is not allowed yet
    requests.append(GenerationRequest(PROMPTS[0], 9, limits=Stuck(2), **waits))
    *stuck, other = run(engine, [*requests, GenerationRequest(PROMPTS[1], 9, seed=1)])
    for tokens, finish in stuck:
        assert ([token.id for token in tokens], finish) == ([7, 7], "length")
    assert other == run(engine, [GenerationRequest(PROMPTS[1], 9, seed=1)])[0]
