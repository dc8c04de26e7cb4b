"""Skip-gram with negative sampling: its samples, its loss, and learned similarity."""

import itertools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from lm.data.store import Manifest, TokenStore
from lm.data.tokenizers.basic import ByteTokenizer, WordTokenizer
from lm.errors import UserError
from lm.evaluation.word_scores import trained_word_vectors
from lm.experiment import build_with_data
from lm.models.classic.feed_forward import SkipGramConfig, SkipGramModel
from lm.objectives.skip_gram import NegativeSampling

A, B, C, D, EOS, UNKNOWN = range(6)
WORDS = WordTokenizer(("a", "b", "c", "d", "<eos>", "<unk>"), (5000, 3000, 1600, 400, 50, 900))


def objective(length=64, tokenizer=WORDS, **options):
    return NegativeSampling(tokenizer, length, **options)


def example(tokens, length):
    padding = length - len(tokens)
    return {
        "tokens": np.pad(np.int32(tokens), (0, padding)),
        "segment_ids": np.pad(np.ones(len(tokens), np.int32), (0, padding)),
    }


def drawn(tokens, n=2000, **options):
    """Features of the same tokens, drawn n times: arrays [n, L]."""
    made = objective(len(tokens), **options)
    rows = [made.features(example(tokens, len(tokens)), np.random.default_rng(i)) for i in range(n)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


# --- features


def test_unknown_words_leave_no_gap_and_lines_are_separate():
    found = objective(8, subsample=0.0).features(
        example([A, UNKNOWN, B, EOS, C, A], 8), np.random.default_rng(0)
    )
    np.testing.assert_array_equal(found["inputs"], [A, B, C, A, 0, 0, 0, 0])
    np.testing.assert_array_equal(found["segment_ids"], [1, 1, 2, 2, 0, 0, 0, 0])
    np.testing.assert_array_equal(found["window_sizes"] > 0, [1, 1, 1, 1, 0, 0, 0, 0])


def test_frequent_words_are_kept_as_often_as_in_the_paper():
    """Mikolov 2013b, equation 5: f = 0.5, 0.3, 0.16, 0.04 and t = 0.08 keep √(t/f)."""
    found = drawn([A, B, C, D] * 4, subsample=0.08)
    kept = np.bincount(found["inputs"][found["segment_ids"] > 0], minlength=6)[:EOS] / (4 * 2000)
    np.testing.assert_allclose(kept, [0.4, 0.5164, 0.7071, 1.0], atol=0.02)


def test_noise_is_drawn_by_counts_to_the_power_of_three_quarters():
    noise = drawn([A, B] * 20)["noise"]
    expected = np.array([5000, 3000, 1600, 400]) ** 0.75
    found = np.bincount(noise.ravel(), minlength=6)
    assert found[EOS:].sum() == 0
    expected *= noise.size / expected.sum()
    assert scipy.stats.chisquare(found[:EOS], expected).pvalue > 0.001


def test_windows_are_symmetric():
    reach = drawn([A] * 10, subsample=0.0, window=4)["window_sizes"]
    found = np.bincount(reach.ravel(), minlength=5)
    assert len(found) == 5
    assert found[0] == 0
    assert scipy.stats.chisquare(found[1:]).pvalue > 0.001


def test_features_have_fixed_shapes_and_depend_on_example_and_generator_only():
    rng = np.random.default_rng(1)
    made, again = objective(subsample=0.05), objective(subsample=0.05)
    one = example(rng.integers(0, 6, 50), 64)
    first, same, other = (
        o.features(one, np.random.default_rng(seed))
        for o, seed in ((made, 3), (again, 3), (made, 4))
    )
    assert {name: (x.shape, x.dtype.name) for name, x in first.items()} == made.shapes
    for name, values in first.items():
        np.testing.assert_array_equal(values, same[name])
        assert (values != other[name]).any()


def test_examples_hold_every_token_once():
    manifest = Manifest(1, "memory", "", "", "uint16", 10, 1, 0, 0, 0, None, {})
    store = TokenStore(Path(), manifest, np.arange(10, dtype=np.uint16), np.array([0, 10]))
    found = objective(4).examples(store, training=False)
    tokens = [window["tokens"][window["segment_ids"] > 0].tolist() for window in found]
    assert tokens == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(objective(4).examples(store, training=True)) == 2


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), WordTokenizer.from_list(b"a\nb\n")], ids=["bytes", "no counts"]
)
def test_unknown_frequencies_are_an_error(tokenizer):
    with pytest.raises(UserError, match=r"word counts: use --config\.data\.tokenizer"):
        objective(tokenizer=tokenizer)


# --- loss

LENGTH, WIDTH = 12, 5


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {
        table: {"embedding": rng.normal(size=(len(WORDS.words), WIDTH)).astype(np.float32)}
        for table in ("tokens", "contexts")
    }


@pytest.fixture(scope="module")
def batch():
    """Three rows of features, the last of them empty."""
    rng = np.random.default_rng(0)
    made = objective(LENGTH, subsample=0.2, window=3)
    texts = [A, B, C, EOS, A, D, B, A, C], [D, A, EOS, B, C, B, B, UNKNOWN, A, C, C, D]
    rows = [made.features(example(text, LENGTH), rng) for text in texts]
    rows.append({name: np.zeros_like(values) for name, values in rows[0].items()})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def sums_of(params, batch, negatives=5):
    made = objective(LENGTH, tokenizer=None, negatives=negatives)
    model = SkipGramModel(SkipGramConfig(len(WORDS.words), WIDTH))
    return nn.apply(made.loss, model)({"params": params}, batch)


def pairs_of(batch):
    """Return (row, center, context) of every pair, by index."""
    for row, (lines, reach) in enumerate(
        zip(batch["segment_ids"], batch["window_sizes"], strict=True)
    ):
        for i, j in itertools.permutations(np.flatnonzero(lines), 2):
            if lines[i] == lines[j] and abs(i - j) <= reach[i]:
                yield row, i, j


@pytest.mark.parametrize("negatives", [1, 7])
def test_loss_matches_the_paper_summed_over_pairs(params, batch, negatives):
    """Mikolov 2013b, equation 4, its expectation over noise taken over the example's noise."""
    centres, contexts = (params[table]["embedding"] for table in ("tokens", "contexts"))
    loss, n = 0.0, 0
    for row, i, j in pairs_of(batch):
        centre = centres[batch["inputs"][row, i]]
        loss -= np.log(scipy.special.expit(contexts[batch["inputs"][row, j]] @ centre))
        of_noise = [
            np.log(scipy.special.expit(-contexts[word] @ centre)) for word in batch["noise"][row]
        ]
        loss -= negatives * np.mean(of_noise)
        n += 1
    sums = sums_of(params, batch, negatives)
    assert n > 20
    assert float(sums.weight) == n
    assert float(sums.loss) == pytest.approx(loss, rel=1e-5)


def test_gradients_match_centers_contexts_and_noise_only(params, batch):
    batch = {name: values.copy() for name, values in batch.items()}
    batch["inputs"][batch["inputs"] == D] = C  # neither a center nor a context
    batch["noise"][batch["noise"] == C] = A
    grads = jax.grad(lambda params: sums_of(params, batch).loss)(params)
    used = {"tokens": set(), "contexts": {*batch["noise"][:2].ravel()}}
    for row, i, j in pairs_of(batch):
        used["tokens"].add(batch["inputs"][row, i])
        used["contexts"].add(batch["inputs"][row, j])
    assert used == {"tokens": {A, B, C}, "contexts": {A, B, C, D}}
    for table, words in used.items():
        touched = np.flatnonzero(np.abs(grads[table]["embedding"]).sum(1))
        assert set(touched) == words


def test_scores_are_finite_far_out(params, batch):
    far = jax.tree.map(lambda x: x * 1e4, params)
    grads = jax.grad(lambda params: sums_of(params, batch).loss)(far)
    assert jnp.isfinite(sums_of(far, batch).loss)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


# --- the whole way


def test_words_in_the_same_contexts_get_similar_vectors(tiny_config, tmp_path):
    """Cat and dog are interchangeable, and so are car and bus."""
    rng = np.random.default_rng(0)
    lines = [
        [("purr", "sleep"), ("cat", "dog"), ("eat", "play")],
        [("drive", "park"), ("car", "bus"), ("road", "wheel")],
    ]
    text = "".join(
        " ".join(rng.choice(slot) for slot in lines[rng.integers(2)]) + "\n" for _ in range(600)
    )
    (tmp_path / "text.txt").write_text(text)
    config = tiny_config(
        model__family="skip_gram",
        model__d_model=8,
        model__init_std=0.1,
        objective__name="skip_gram",
        objective__subsample=0.0,
        data__source=f"text:{tmp_path / 'text.txt'}",
        data__documents="file",
        data__tokenizer="words",
        data__validation_fraction=0.0,
        optimizer__learning_rate=0.05,
        train__steps=100,
    )
    experiment, dataset = build_with_data(config, jax.devices()[:1])
    batches = experiment.train_batches(dataset)
    rows = [batches.rows(step, range(8)) for step in range(100)]
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    state, metrics = experiment.train_steps(experiment.init_state(), stacked)
    assert metrics["loss"][0] == pytest.approx(6 * np.log(2), rel=1e-3)  # at first all is even
    vectors = trained_word_vectors(experiment.param_infos, state.params, dataset.tokenizer)
    unit = vectors.vectors / np.linalg.norm(vectors.vectors, axis=1, keepdims=True)
    cat, dog, car, bus = (unit[vectors.words.index(w)] for w in ("cat", "dog", "car", "bus"))
    alike, unlike = (cat @ dog, car @ bus), (cat @ car, cat @ bus, dog @ car, dog @ bus)
    assert min(alike) > max(unlike) + 0.4
