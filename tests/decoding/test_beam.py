import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.decoding.batch import search_batches
from lm.decoding.beam import BeamOptions, beam_search
from lm.decoding.controls import Controls

END, VOCAB, LONGEST = 2, 5, 4
SOURCES, PROMPTS = [[3, 4, 3, 2], [4, 2], [3, 2]], [[1, 3, 4], [1, 0], [1]]
POSITIONS = {"encoder_decoder": "relative", "decoder": "learned"}
CLASSICS = ("lstm_encoder_decoder", "lstm", "nplm")
ALPHAS = (0.0, 0.6, 2.5)


def score(log_probability, length, alpha):
    """Wu et al. 2016, equation 14, without coverage."""
    return log_probability / ((5 + length) ** alpha / (5 + 1) ** alpha)


def every_hypothesis(experiment, params, text, alpha, log_probabilities):
    """All there are, best first: those that end, and those cut at the longest length."""
    sequences = np.array(list(itertools.product(range(VOCAB), repeat=LONGEST)))
    logs = log_probabilities(experiment, params, text, sequences)
    found = {}
    for sequence, log in zip(sequences.tolist(), logs, strict=True):
        ends = sequence.index(END) + 1 if END in sequence else LONGEST
        output = tuple(token for token in sequence[:ends] if token != END)
        found[output, sequence[ends - 1] == END] = score(log[:ends].sum(), ends, alpha)
    return sorted(found.items(), key=lambda item: -item[1])


def search(experiment, params, tokenizer, texts, beam_size, alpha, **controls):
    options = BeamOptions(beam_size, LONGEST, alpha, Controls((END,), **controls))
    return list(search_batches(experiment, params, tokenizer, texts, options))


@pytest.fixture(params=POSITIONS)
def made(request, make_experiment):
    family = request.param
    positions = POSITIONS.get(family, "none")
    made = make_experiment(family, model__positions=positions, model__vocab_size=VOCAB)
    return *made, SOURCES if "encoder_decoder" in family else PROMPTS


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_beam_wide_enough_finds_every_hypothesis_in_order(made, log_probabilities, alpha):
    experiment, params, tokenizer, texts = made
    n = 4**0 + 4**1 + 4**2 + 4**3 + 4**4  # ended after 0 … 3 tokens, and cut after 4
    found = search(experiment, params, tokenizer, texts, 400, alpha)
    for text, outputs in zip(texts, found, strict=True):
        expected = every_hypothesis(experiment, params, text, alpha, log_probabilities)
        assert len(outputs) == len(expected) == n
        scores = [output.score for output in outputs]
        assert scores == sorted(scores, reverse=True)
        np.testing.assert_allclose(scores, [value for _, value in expected], atol=1e-4)
        assert tuple(outputs[0].tokens) == expected[0][0][0]
        by_output = {output: value for (output, _), value in expected}
        for output in outputs:
            assert output.score == pytest.approx(by_output[tuple(output.tokens)], abs=1e-4)


def plain_search(next_logs, beam_size, alpha, longest):
    """The search that beam.py's docstring describes, without stopping early; tokens with end."""
    running, finished = [((), 0.0)], []
    for length in range(1, longest + 1):
        candidates = [
            ((*tokens, token), log + step)
            for tokens, log in running
            for token, step in enumerate(next_logs(tokens))
        ]
        candidates = sorted(candidates, key=lambda c: -c[1])[:beam_size]
        ends = [c[0][-1] == END or length == longest for c in candidates]
        running = [c for c, end in zip(candidates, ends, strict=True) if not end]
        finished += [
            (tokens, score(log, length, alpha))
            for (tokens, log), end in zip(candidates, ends, strict=True)
            if end
        ]
    return sorted(finished, key=lambda f: -f[1])[:beam_size]


@pytest.mark.parametrize(
    ("made", "beam_size", "alpha"),
    [
        *(pair for family in POSITIONS for pair in [(family, 2, 0.6), (family, 3, 2.5)]),
        *((family, 3, 0.6) for family in CLASSICS),
    ],
    indirect=["made"],
)
def test_narrow_beam_equals_a_plain_search(made, log_probabilities, beam_size, alpha):
    experiment, params, tokenizer, texts = made

    found = search(experiment, params, tokenizer, texts, beam_size, alpha)
    for text, outputs in zip(texts, found, strict=True):

        def next_logs(tokens, text=text):
            padded = [
                [*tokens, token] + [0] * (LONGEST - 1 - len(tokens)) for token in range(VOCAB)
            ]
            return log_probabilities(experiment, params, text, padded)[:, len(tokens)]

        expected = plain_search(next_logs, beam_size, alpha, LONGEST)
        assert [o.tokens for o in outputs] == [[t for t in y if t != END] for y, _ in expected]
        np.testing.assert_allclose([o.score for o in outputs], [s for _, s in expected], atol=1e-4)


def test_inputs_searched_together_and_alone_give_the_same(made):
    experiment, params, tokenizer, texts = made
    together = search(experiment, params, tokenizer, texts, 3, 0.6)
    alone = [search(experiment, params, tokenizer, [text], 3, 0.6)[0] for text in texts]
    assert [[o.tokens for o in outputs] for outputs in together] == [
        [o.tokens for o in outputs] for outputs in alone
    ]


def test_beam_of_one_is_greedy(made, log_probabilities):
    experiment, params, tokenizer, texts = made
    found = search(experiment, params, tokenizer, texts, 1, 0.6)
    for text, (output,) in zip(texts, found, strict=True):
        tokens = []
        while len(tokens) < LONGEST:
            padded = [[*tokens, t] + [0] * (LONGEST - 1 - len(tokens)) for t in range(VOCAB)]
            logs = log_probabilities(experiment, params, text, padded)[:, len(tokens)]
            if logs.argmax() == END:
                break
            tokens.append(int(logs.argmax()))
        assert output.tokens == tokens


# A model of the last token only, whose cache counts its steps.

N_STEPS = []


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Counter:
    n: jax.Array

    def take(self, rows):
        return self


def markov_search(table, options, limits=(1000,)):
    """Hypotheses [tokens, score] of a model whose next logits are a row of `table`."""
    table = jnp.asarray(table, jnp.float32)

    def decode(tokens, positions, cache):
        jax.debug.callback(lambda n: N_STEPS.append(int(n)), cache.n)
        return table[tokens], Counter(cache.n + 1)

    N_STEPS.clear()
    limits = jnp.array(limits)
    start = jnp.tile(table[:1], (len(limits), 1))
    found = jax.jit(
        lambda: beam_search(
            decode, Counter(jnp.zeros((), int)), start, jnp.ones_like(limits), limits, options
        )
    )()
    jax.effects_barrier()
    return [
        [(t[:n].tolist(), float(s)) for t, s, n in zip(*row, strict=True)]
        for row in zip(*map(np.asarray, found), strict=True)
    ]


LOOP = np.log([[0.05, 0.9, 0.05], [0.05, 0.9, 0.05], [1 / 3] * 3])  # goes on with 1, may end with 2


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("ending", [0.1, 0.9])
def test_stopping_early_changes_nothing(alpha, ending):
    rest = (1 - ending) / 2
    table = np.log([[rest, rest, ending], [rest * 1.5, rest * 0.5, ending], [rest, rest, ending]])
    expected = plain_search(lambda y: table[y[-1] if y else 0], 3, alpha, 30)
    (found,) = markov_search(table, BeamOptions(3, 30, alpha, Controls((END,))))
    np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], rtol=1e-5)
    assert found[0][0] == list(expected[0][0])


def test_beam_search_stops_when_no_hypothesis_can_improve():
    table = np.log([[0.05, 0.05, 0.9]] * 3)
    markov_search(table, BeamOptions(2, 1000, 0.0, Controls((END,))))
    assert len(N_STEPS) == 1  # [end] and [x, end]: what runs on has 0.05² at best
    # Divided by ((5 + 30) / 6)^1.5 = 14.1, a running log-probability of -40 could still win.
    markov_search(table, BeamOptions(2, 30, 1.5, Controls((END,))))
    assert 1 < len(N_STEPS) < 29


def test_beam_search_waits_for_long_hypotheses():
    """After two steps finished hypotheses lead, but a length of 100 divides by 306."""
    table = np.log([[1e-9, 0.45, 0.55]] * 3)
    (found,) = markov_search(table, BeamOptions(2, 100, 2.0, Controls((END,))))
    longest = (99 * np.log(0.45) + np.log(0.55)) / (105 / 6) ** 2
    assert found[0] == ([1] * 99 + [END], pytest.approx(longest, rel=1e-4))


def test_inputs_have_separate_limits():
    found = markov_search(LOOP, BeamOptions(1, 6, 0.0, Controls((END,))), limits=(2, 9, 1))
    assert [row[0][0] for row in found] == [[1] * 2, [1] * 6, [1]]


def test_missing_hypotheses_are_empty():
    only = np.tile([0, -np.inf, -np.inf], (3, 1))
    (found,) = markov_search(only, BeamOptions(3, 2, 1.0, Controls((END,))))
    assert found[0] == ([0, 0], 0.0)
    assert found[1:] == [([], -np.inf)] * 2
    nothing = Controls((END,), banned=((0,), (1,), (2,)))
    assert markov_search(LOOP, BeamOptions(2, 3, 1.0, nothing)) == [[([], -np.inf)] * 2]
