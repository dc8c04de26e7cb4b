import flax.linen as nn
import jax
import numpy as np
import pytest

from lm.decoding.controls import START, Controls
from lm.decoding.sampling import Sampling, sample_steps
from lm.errors import UserError
from lm.models.decoder import Decoder
from lm.models.transformer_config import TransformerConfig

CONTEXT, VOCAB = 16, 24
PROMPTS = ([5, 1, 7, 2], [3], [9, 9, 4, 11, 0, 6, 8])
GREEDY = Sampling(0.0)


def generate(*args, end_ids=(), **options):
    return sample_steps(*args, controls=Controls(end_ids), **options)


@pytest.fixture(scope="module")
def model():
    return Decoder(
        TransformerConfig(
            n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=64,
            vocab_size=VOCAB, max_length=CONTEXT, init_std=0.5,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def params(model):
    return nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), int)))["params"]


@pytest.fixture(scope="module")
def greedy_continuation(model, params):
    """Greedy decoding without a cache: the whole sequence again for every token."""
    apply = jax.jit(model.apply)

    def decode(prompt, n):
        tokens = list(prompt)
        while len(tokens) < min(len(prompt) + n, CONTEXT):
            row = np.zeros((1, CONTEXT), int)
            row[0, : len(tokens)] = tokens
            tokens.append(int(apply({"params": params}, row)[0, len(tokens) - 1].argmax()))
        return tokens[len(prompt) :]

    return decode


def rows_of(steps):
    """The tokens of each row, up to its end."""
    table = np.stack(list(steps), axis=1)
    for row in table:  # a row that has ended stays ended
        assert (np.diff((row < 0).astype(int)) >= 0).all()
    return [[int(token) for token in row if token >= 0] for row in table]


@pytest.mark.parametrize("temperature", [0.0, 9.0])
def test_row_without_allowed_tokens_ends(model, params, temperature):
    """Rows begin with 5, which nothing may follow, or 9, after which they go on."""
    first = tuple((START, i) for i in range(VOCAB) if i not in (5, 9))
    controls = Controls(banned=(*first, *((5, i) for i in range(VOCAB))))
    prompts, sampling = PROMPTS * 3, Sampling(temperature)
    rows = rows_of(sample_steps(model, params, prompts, 6, sampling, 0, controls))
    assert {row[0] for row in rows} == {5, 9}
    assert all(row[-1] == 5 if 5 in row else len(row) == 6 for row in rows)
    nothing = Controls(banned=tuple((i,) for i in range(VOCAB)))
    assert list(sample_steps(model, params, prompts, 6, sampling, 0, nothing)) == []


def test_greedy_equals_decoding_without_a_cache(model, params, greedy_continuation):
    found = rows_of(generate(model, params, PROMPTS, 6, GREEDY, seed=0))
    assert found == [greedy_continuation(prompt, 6) for prompt in PROMPTS]


def test_rows_end_when_their_context_is_full(model, params, greedy_continuation):
    found = rows_of(generate(model, params, PROMPTS, 100, GREEDY, seed=0))
    assert [len(row) for row in found] == [CONTEXT - len(prompt) for prompt in PROMPTS]
    assert found == [greedy_continuation(prompt, 100) for prompt in PROMPTS]


def test_row_ends_before_the_end_token(model, params, greedy_continuation):
    expected = [greedy_continuation(prompt, 6) for prompt in PROMPTS]
    end = expected[0][2]
    cut = [row[: row.index(end)] if end in row else row for row in expected]
    assert rows_of(generate(model, params, PROMPTS, 6, GREEDY, 0, end_ids=(end,))) == cut


def test_generation_stops_once_every_row_has_ended(model, params, greedy_continuation):
    first = greedy_continuation(PROMPTS[0], 1)[0]
    assert list(generate(model, params, PROMPTS[:1], 6, GREEDY, 0, end_ids=(first,))) == []


def test_sampled_rows_depend_on_seed_prompt_and_place_only(model, params):
    def sample(prompts, seed):
        return rows_of(generate(model, params, prompts, 6, Sampling(), seed))

    assert sample(PROMPTS, 1) == sample(PROMPTS, 1)
    assert sample(PROMPTS, 1) != sample(PROMPTS, 2)
    others = (PROMPTS[0], [1, 2], [4, 4, 4, 4, 4, 4, 4])
    assert sample(PROMPTS, 1)[0] == sample(others, 1)[0]
    same = sample([PROMPTS[0]] * 3, 1)
    assert same[0] != same[1]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 2 is empty"),
        ([list(range(CONTEXT))], "prompt 1 has 16 tokens; the context holds 16"),
    ],
)
def test_prompts_that_cannot_be_continued(model, params, prompts, message):
    with pytest.raises(UserError, match=message):
        next(generate(model, params, prompts, 4, GREEDY, 0))


def test_longest_prompt_is_continued_by_one_token(model, params, greedy_continuation):
    prompt = list(range(CONTEXT - 1))
    found = rows_of(generate(model, params, [prompt], 5, GREEDY, 0))
    assert found == [greedy_continuation(prompt, 5)]
