"""Sampling with per-row options, against the same rules in numpy."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.decoding.engine.option_table import OptionTable
from lm.decoding.engine.requests import GenerationRequest
from lm.decoding.engine.row_sampling import choose_tokens

B, T, V = 3, 10, 12
IDS = st.integers(0, V - 1)
OPTIONS = st.fixed_dictionaries(
    {
        "prompt": st.lists(IDS, min_size=1, max_size=4).map(tuple),
        "seed": st.integers(0, 2**64 - 1),
        "number": st.integers(0, 9),
        "max_new_tokens": st.just(T),
    },
    optional={
        "temperature": st.sampled_from([0.0, 0.9, 2.0]),
        "top_k": st.integers(0, V + 2),
        "top_p": st.floats(0.1, 1),
        "min_p": st.floats(0.02, 0.5),
        "repetition_penalty": st.floats(0.5, 2),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(IDS, st.floats(-5, 5), max_size=3),
        "min_new_tokens": st.integers(0, 4),
        "end_ids": st.lists(IDS, max_size=2, unique=True).map(tuple),
        "top_logprobs": st.integers(0, 5),
    },
)
ROW = st.tuples(OPTIONS, st.lists(IDS, max_size=T - 4), st.integers(0, 2**V - 1))


@jax.jit
def chosen_and_noise(logits, tokens, lengths, options, allowed):
    def of_row(words, n_new, number):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(words), n_new), number)
        return jax.random.gumbel(key, (V,))

    n_new = lengths - options.n_prompt_B
    noise = jax.vmap(of_row)(options.keys_B2, n_new, options.numbers_B)
    return choose_tokens(logits, tokens, lengths, options, allowed), noise


def scores_of(r, logits, reply, allowed):
    """Logits after penalties, bias, masks and temperature."""
    counts = np.bincount(np.array(reply, int), minlength=V)
    x = np.where(logits > 0, logits / r.repetition_penalty, logits * r.repetition_penalty)
    x = np.where(counts > 0, x - r.presence_penalty, logits) - r.frequency_penalty * counts
    for token, bias in r.logit_bias.items():
        x[token] += bias
    x[~allowed] = -np.inf
    if len(reply) < r.min_new_tokens:
        x[list(r.end_ids)] = -np.inf
    return x / (r.temperature or 1)


def kept(r, x, slack):
    """Tokens that the filters keep; fewer or more of those at their bounds by the slack."""
    k = r.top_k if 0 < r.top_k < V else V
    x = np.where((x < x.max()) & (x < np.sort(x)[-k] - slack), -np.inf, x)
    p = np.exp(x - np.logaddexp.reduce(x))
    likelier = np.array([p[p > one + abs(slack) * one].sum() for one in p])
    is_kept = (likelier < max(r.top_p, 1e-9) + slack) | (p == p.max()) | (r.top_p >= 1)
    return is_kept & (p >= p.max() * r.min_p * (1 - slack)) & (p > 0)


@settings(max_examples=60)
@given(rows=st.lists(ROW, min_size=B, max_size=B), seed=st.integers(0, 99))
def test_each_row_has_the_token_of_its_own_options(rows, seed):
    logits = np.random.default_rng(seed).normal(0, 2, (B, V)).astype(np.float32)
    table, tokens, lengths = OptionTable(B, V), np.zeros((B, T), np.int32), np.zeros(B, np.int32)
    allowed = np.array([[bool(mask >> i & 1) for i in range(V)] for _, _, mask in rows])
    requests = [GenerationRequest(**options) for options, _, _ in rows]
    for i, (r, (_, reply, _)) in enumerate(zip(requests, rows, strict=True)):
        text = [*r.prompt, *reply]
        tokens[i, : len(text)], lengths[i] = text, len(text)
        table.check(r)
        table.set(i, r, r.seed, 0)
        allowed[i, (set(range(V)) - set(r.end_ids)).pop()] = True
    chosen, noise = jax.device_get(
        chosen_and_noise(logits, tokens, lengths, table.on_device, allowed)
    )
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    for i, (r, (_, reply, _)) in enumerate(zip(requests, rows, strict=True)):
        token, x = chosen.tokens_B[i], scores_of(r, logits[i], reply, allowed[i])
        if r.temperature:
            assert kept(r, x, 1e-4)[token]
            best = (x + noise[i])[kept(r, x, -1e-4)].max(initial=-np.inf)
            assert x[token] + noise[i, token] >= best - 1e-3
        else:
            assert x[token] >= x.max() - 1e-4
        if r.top_logprobs is not None:
            np.testing.assert_allclose(chosen.logprobs_B[i], logprobs[i, token], atol=1e-4)
            n = r.top_logprobs
            assert chosen.listed_BC[i, :n].tolist() == np.argsort(-logprobs[i])[:n].tolist()
