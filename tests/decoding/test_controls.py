import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.decoding.beam import BeamOptions, beam_search
from lm.decoding.controls import (
    START,
    UNSET,
    Controls,
    banned_sequences,
    ends_of_banned,
    parse_sequences,
    penalize_repeats,
)
from lm.errors import UserError

WRITTEN = jnp.array([[1, 3, UNSET], [2, 2, UNSET], [UNSET] * 3])


def test_repeats_are_divided_if_positive_and_multiplied_if_negative():
    logits = jnp.tile(jnp.array([0.5, -1.0, 2.0, 3.0]), (3, 1))
    expected = [[0.5, -2.0, 2.0, 1.5], [0.5, -1.0, 1.0, 3.0], [0.5, -1.0, 2.0, 3.0]]
    np.testing.assert_allclose(penalize_repeats(logits, WRITTEN, 2.0), expected)


def test_minus_infinity_stays():
    logits = jnp.array([[-jnp.inf, 1.0, 0.0, -jnp.inf]])
    found = penalize_repeats(logits, jnp.array([[0, 2, UNSET]]), 1.5)
    np.testing.assert_array_equal(found, logits)


@pytest.mark.parametrize(
    ("banned", "expected"),
    [
        (((2,),), [[2], [2], [2]]),
        (((3, 0),), [[0], [], []]),
        (((1, 3, 2),), [[2], [], []]),
        (((2, 2, 2), (2, 1)), [[], [1, 2], []]),
        (((3, 1), (0,), (1, 3, 1)), [[0, 1], [0], [0]]),
        (((9, 1, 3, 0),), [[], [], []]),
        (((START, 1), (START, 1, 3, 0), (START, 3, 2)), [[0], [], [1]]),
    ],
)
def test_tokens_that_complete_a_banned_sequence(banned, expected):
    found = np.asarray(ends_of_banned(WRITTEN, jnp.array(2), banned, 4))
    assert [np.flatnonzero(row).tolist() for row in found[:2]] == expected[:2]
    found = np.asarray(ends_of_banned(WRITTEN, jnp.array(0), banned, 4))
    assert np.flatnonzero(found[2]).tolist() == expected[2]


def test_end_waits_for_the_shortest_length():
    controls = Controls(end_ids=(3,), min_length=2)
    scores = jnp.zeros((3, 4))
    for n, end in ((0, -np.inf), (1, -np.inf), (2, 0), (3, 0)):
        found = np.asarray(controls.masked(scores, WRITTEN, jnp.array(n)))
        np.testing.assert_array_equal(found[:, 3], end)
        np.testing.assert_array_equal(found[:, :3], 0)


def test_without_an_end_there_is_no_shortest_length():
    scores = jnp.zeros((3, 4))
    found = Controls(min_length=9).masked(scores, WRITTEN, jnp.array(0))
    np.testing.assert_array_equal(found, scores)


# --- searched


class Nothing:
    def take(self, rows):
        return self


jax.tree_util.register_static(Nothing)


def searched(probabilities, controls, longest):
    """The best output where every next token has these probabilities."""
    logits = jnp.log(jnp.array([probabilities]))

    def decode(tokens, positions, cache):
        return jnp.tile(logits, (len(tokens), 1, 1)), cache

    one = jnp.ones(1, int)
    found = beam_search(
        decode, Nothing(), logits, one, one * 99, BeamOptions(20, longest, 0.0, controls)
    )
    tokens, scores, lengths = (np.asarray(x)[0, 0] for x in found)
    return tokens[:lengths].tolist(), float(scores)


def test_beam_search_obeys_controls():
    chances = [0.5, 0.3, 0.2]  # 2 ends
    assert searched(chances, Controls((2,)), 4)[0] == [2]
    tokens, score = searched(chances, Controls((2,), min_length=2), 8)
    assert (tokens, score) == ([0, 0, 2], pytest.approx(np.log(0.5 * 0.5 * 0.2), rel=1e-5))
    # The most likely of three tokens and the end that lacks "0 0", and has its own probability.
    tokens, score = searched(chances, Controls((2,), min_length=3, banned=((0, 0),)), 8)
    assert (tokens, score) == ([0, 1, 0, 2], pytest.approx(np.log(0.5 * 0.3 * 0.5 * 0.2), rel=1e-5))


def test_beam_search_applies_the_repetition_penalty():
    """After 0, logits log 0.5 = -0.69 become -2.08, below log 0.3 = -1.20 of token 1."""
    tokens, _ = searched([0.5, 0.3, 0.2], Controls((2,), 3.0, min_length=2), 3)
    assert tokens[:2] == [0, 1]


# --- from words and configurations


class Spaced:
    """A space belongs to the word after it; "new" has two tokens, "x" is unknown."""

    def encode(self, text):
        words = {"york": [1], " york": [2], "new": [3, 4], " new": [5, 4], "x": [9], " x": [9]}
        return np.array(words[text])

    def token_id(self, name):
        return {"<unk>": 9}.get(name)


def test_word_is_banned_with_and_without_a_space():
    assert banned_sequences(Spaced(), ["york", "new"]) == ((1,), (2,), (3, 4), (5, 4))


def test_unknown_word_bans_nothing():
    assert banned_sequences(Spaced(), ["x", "york"]) == ((1,), (2,))


def test_controls_of_a_configuration(make_experiment):
    experiment, _, tokenizer = make_experiment(
        "decoder",
        decode__banned="ab, c,",
        decode__banned_tokens="^7, 4 5",
        decode__min_length=2,
        decode__repetition_penalty=1.5,
    )
    tokenizer.encode = lambda text: np.array([ord(letter) for letter in text])
    banned = (97, 98), (32, 97, 98), (99,), (32, 99), (START, 7), (4, 5)
    expected = Controls((2,), 1.5, banned, 2)
    assert Controls.from_config(experiment.config, tokenizer) == expected


def test_banned_tokens_are_ids():
    assert parse_sequences("3,^4 5 , 6 7") == ((3,), (START, 4, 5), (6, 7))
    for text in ("a", "3 ^4", "-1", "1234567890", "3;4", "^"):
        with pytest.raises(UserError, match="is neither a token id"):
            parse_sequences(f"2,{text}")
