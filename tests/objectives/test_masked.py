from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lm.data.tokenizers.basic import ByteTokenizer
from lm.data.tokenizers.hf import HuggingFaceTokenizer
from lm.errors import UserError
from lm.objectives.masked import Masked

CLS = SEP = 256  # of bytes
MASK = 257

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "he", "##l", "##lo", "wor", "##ld", "a"]


def bert_pieces():
    tokenizers = pytest.importorskip("tokenizers")
    ids = {piece: i for i, piece in enumerate(BERT)}
    model = tokenizers.models.WordPiece(ids, unk_token="[UNK]")
    return HuggingFaceTokenizer(tokenizers.Tokenizer(model).to_str().encode())


def window(segments, seed=0, low=0, high=256):
    """A window of random tokens with the given segment ids."""
    segments = np.asarray(segments, np.int32)
    sizes = np.bincount(segments)[1:]
    positions = np.concatenate([*map(np.arange, sizes), np.zeros((segments == 0).sum())])
    tokens = np.random.default_rng(seed).integers(low, high, len(segments))
    tokens[segments == 0] = 0
    return {
        "tokens": tokens.astype(np.int32),
        "segment_ids": segments,
        "positions": positions.astype(np.int32),
    }


def many(objective, example, n):
    rng = np.random.default_rng(0)
    return [objective.features(example, rng) for _ in range(n)]


def unmasked(found):
    """The inputs with every masked token put back."""
    inputs = found["inputs"].copy()
    real = found["weights"] == 1
    inputs[found["masked_positions"][real]] = found["targets"][real]
    return inputs


def test_random_tokens_have_a_row_in_the_table():
    objective = Masked(ByteTokenizer(), 66, mask_rate=0.5, n_rows=100)
    found = many(objective, window([1] * 64, high=100), 40)
    assert max(row["inputs"][row["inputs"] < CLS].max() for row in found) < 100


def test_row_is_cls_the_window_and_sep():
    example = window([1, 1, 2, 2, 2, 0])
    found = Masked(ByteTokenizer(), 8).features(example, np.random.default_rng(0))
    tokens = example["tokens"][:5].tolist()
    assert unmasked(found).tolist() == [CLS, *tokens, SEP, 0]
    assert found["segment_ids"].tolist() == [1, 1, 1, 2, 2, 2, 2, 0]
    assert found["positions"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]


def test_fifteen_percent_are_chosen_and_of_them_80_10_10():
    example = window(np.ones(126))
    rows = many(Masked(ByteTokenizer(), 128), example, 500)
    original = unmasked(rows[0])
    outcomes, chosen = Counter(), Counter()
    random_tokens = set()
    for found in rows:
        at = found["masked_positions"]
        assert len(set(at)) == found["weights"].sum() == 19  # 0.15 · 126 = 18.9
        np.testing.assert_array_equal(unmasked(found), original)
        chosen.update(at.tolist())
        for now, before in zip(found["inputs"][at], found["targets"], strict=True):
            kind = "mask" if now == MASK else "same" if now == before else "random"
            random_tokens |= {int(now)} if kind == "random" else set()
            outcomes[kind] += 1
    # Four standard deviations of 9,500 draws; one random token in 256 is the same.
    assert outcomes["mask"] / 9500 == pytest.approx(0.8, abs=0.017)
    assert outcomes["random"] / 9500 == pytest.approx(0.1, abs=0.013)
    assert outcomes["same"] / 9500 == pytest.approx(0.1, abs=0.013)
    assert random_tokens <= set(range(256))
    assert len(random_tokens) > 200
    assert set(chosen) == set(range(1, 127))
    for count in chosen.values():
        assert count == pytest.approx(500 * 19 / 126, abs=35)  # 4.4 standard deviations


def test_padding_and_special_tokens_are_never_chosen():
    example = window(np.repeat([1, 2, 0], [20, 10, 32]))
    example["tokens"][[3, 19, 20]] = 256
    for found in many(Masked(ByteTokenizer(), 64, mask_rate=0.5), example, 50):
        n = int(found["weights"].sum())
        assert n == round(0.5 * 27)
        assert found["weights"].tolist() == [1] * n + [0] * (31 - n)
        assert set(found["masked_positions"][:n]) <= set(range(1, 31)) - {4, 20, 21}
        assert not found["masked_positions"][n:].any()
        assert 256 not in found["targets"]


def test_at_least_one_token_is_chosen():
    for found in many(Masked(ByteTokenizer(), 64), window([1, 1] + [0] * 60), 20):
        assert found["weights"].sum() == 1


def test_random_tokens_are_no_special_ones():
    """BERT's vocabulary above has 7 tokens that are not special ([UNK] is a word like others)."""
    objective = Masked(bert_pieces(), 64, mask_rate=1.0)
    seen = Counter()
    for found in many(objective, window(np.ones(62), low=10, high=11), 50):
        seen.update(found["inputs"][found["masked_positions"]].tolist())
    assert set(seen) == {1, 4, 5, 6, 7, 8, 9, 10}
    assert objective.n_extra_ids == 0


def test_tokens_of_a_word_are_chosen_together():
    ids = {piece: i for i, piece in enumerate(BERT)}
    words = [["he", "##l", "##lo"], ["wor", "##ld"], ["a"], ["wor", "##l", "##l", "##ld"]]
    text = [words[i] for i in np.random.default_rng(0).integers(0, 4, 24)]
    text[4:4] = [["[SEP]"], ["[CLS]"]]
    tokens = np.array([ids[piece] for word in text for piece in word])
    example = window(np.ones(len(tokens))) | {"tokens": tokens.astype(np.int32)}
    spans = np.split(1 + np.arange(len(tokens)), np.cumsum([len(word) for word in text])[:-1])
    spans = {tuple(span.tolist()) for span in spans}
    seen = set()
    for found in many(Masked(bert_pieces(), len(tokens) + 2, whole_word=True), example, 200):
        at = set(found["masked_positions"][found["weights"] == 1].tolist())
        whole = {span for span in spans if at >= set(span)}
        assert at == {i for span in whole for i in span}
        assert len(at) == round(0.15 * (len(tokens) - 2))
        seen |= whole
    assert len(seen) == len(spans) - 2


def test_word_ends_with_its_document():
    """Of "ab|cd", without a space, the two bytes of either document are a word."""
    objective = Masked(ByteTokenizer(), 6, mask_rate=0.5, whole_word=True)
    example = window([1, 1, 2, 2], low=97)
    rows = many(objective, example, 20)
    assert {tuple(found["masked_positions"]) for found in rows} == {(1, 2), (3, 4)}
    example = window([1, 1, 1, 1, 1], low=97)
    example["tokens"][2] = 256  # the end of a document
    rows = many(replace(objective, length=7), example, 20)
    assert {tuple(found["masked_positions"]) for found in rows} == {(1, 2), (4, 5)}


def pairs(n=400, **changes):
    """Windows of one 20-token document each, the k-th of tokens 20 k … 20 k + 19."""
    examples = [window(np.ones(20)) | {"tokens": np.arange(20) + 20 * k} for k in range(12)]
    objective = Masked(ByteTokenizer(), 24, next_sentence=True, **changes)
    rng = np.random.default_rng(0)
    return [objective.features({**examples[i % 6], "others": examples[6:]}, rng) for i in range(n)]


def split(found):
    row = unmasked(found)[found["segment_ids"] == 1].tolist()
    cut = row.index(SEP, 1)
    assert row[0] == CLS
    assert row[-1] == SEP
    types = [0] * (cut + 1) + [1] * (len(row) - cut - 1)
    assert found["token_types"].tolist() == types + [0] * (24 - len(row))
    assert found["positions"][: len(row)].tolist() == list(range(len(row)))
    return row[1:cut], row[cut + 1 : -1]


def test_half_of_the_second_texts_follow_the_first():
    rows = pairs()
    cuts, starts = Counter(), set()
    for found in rows:
        first, second = split(found)
        assert first == list(range(first[0], first[0] + len(first)))
        assert second == list(range(second[0], second[0] + len(second)))
        assert first[0] < 120
        assert len(first) + len(second) == 20
        assert found["is_next"] == (second[0] == first[-1] + 1)
        assert found["is_next"] == (second[0] < 120)
        cuts[len(first)] += 1
        starts |= set() if found["is_next"] else {second[0] % 20}
    assert np.mean([found["is_next"] for found in rows]) == pytest.approx(0.5, abs=0.1)
    assert set(cuts) == set(range(1, 20))
    assert len(starts) > 12


def test_pairs_come_from_the_longest_document_without_delimiters():
    example = window(np.repeat([1, 2, 3, 0], [4, 9, 5, 3]), low=60)
    example["tokens"][[4, 12]] = 256
    example["others"] = [window(np.repeat([1, 2], [15, 6]), high=60)]
    rows = many(Masked(ByteTokenizer(), 24, next_sentence=True), example, 50)
    document, other = example["tokens"][5:12].tolist(), example["others"][0]["tokens"].tolist()
    for found in rows:
        first, second = split(found)
        assert first == document[: len(first)]
        assert len(first) + len(second) == 7
        if not found["is_next"]:
            starts = [i for i in range(15) if other[i : i + len(second)] == second]
            assert starts
    assert {int(found["is_next"]) for found in rows} == {0, 1}


def test_document_of_one_token_still_makes_a_row():
    example = window([1] + [0] * 20) | {"others": [window([1] * 21)]}
    for found in many(Masked(ByteTokenizer(), 24, next_sentence=True), example, 9):
        assert split(found) == ([int(example["tokens"][0])], [])


def test_windows_fill_rows_and_adjoin(make_store):
    store = make_store([list(range(50)), list(range(50, 66))])
    objective = Masked(ByteTokenizer(), 24)
    examples = objective.examples(store, training=False)
    tokens = [e["tokens"][e["segment_ids"] > 0] for e in map(examples.__getitem__, range(3))]
    assert list(map(len, tokens)) == [22, 22, 22]
    np.testing.assert_array_equal(np.concatenate(tokens), range(66))
    examples = Masked(ByteTokenizer(), 25, stride=10, next_sentence=True).examples(store, True)
    assert len(examples) == 5
    example = examples[1]
    np.testing.assert_array_equal(example["tokens"], range(10, 32))
    np.testing.assert_array_equal(example["others"][4]["tokens"], range(40, 62))


@pytest.mark.parametrize("next_sentence", [False, True])
@pytest.mark.parametrize("whole_word", [False, True])
def test_features_have_the_stated_shapes_and_depend_on_the_generator_only(
    next_sentence, whole_word
):
    objective = Masked(ByteTokenizer(), 64, whole_word=whole_word, next_sentence=next_sentence)
    n = objective.window_length
    words = {"low": 30, "high": 34}  # 32 is the space
    example = window(np.ones(n), **words) | {"others": [window(np.ones(n), seed=1, **words)]}
    first, again, other = (
        objective.features(example, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert {name: (x.shape, x.dtype.name) for name, x in first.items()} == objective.shapes
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
    assert (first["masked_positions"] != other["masked_positions"]).any()
    assert Masked(None, 64, next_sentence=next_sentence).shapes == objective.shapes


@pytest.mark.parametrize(("length", "next_sentence"), [(3, False), (4, True)])
def test_row_too_short_for_text_is_reported(length, next_sentence):
    with pytest.raises(UserError, match=f"sequence_length={length}"):
        Masked(ByteTokenizer(), length, next_sentence=next_sentence)


class Encoder:
    """Stands for an encoder: a fixed function of token, position and type."""

    config = SimpleNamespace(loss_chunk=0)

    def __init__(self):
        rng = np.random.default_rng(0)
        self.table, self.places = rng.normal(size=(258, 8)), rng.normal(size=(24, 8))
        self.out, self.pool = rng.normal(size=(8, 258)), rng.normal(size=(8, 2))

    def hidden(self, tokens_BL, positions_BL, segment_ids_BL, types_BL):
        types_BL = 0 * tokens_BL if types_BL is None else types_BL
        x_BLD = jnp.asarray(self.table)[tokens_BL] + jnp.asarray(self.places)[positions_BL]
        return x_BLD + 0.1 * types_BL[..., None]

    def logits(self, x_BPD):
        return x_BPD @ self.out

    def pooled(self, x_BLD, segment_ids_BL):
        return x_BLD[:, 0] + x_BLD[:, 5]

    def next_sentence(self, x_BD):
        return x_BD @ self.pool


def batch_of(rows):
    return jax.tree.map(lambda *xs: np.stack(xs), *rows)


def means(rows):
    """Mean nats of the masked tokens, and of the classes, as Devlin 2018 adds them."""
    encoder, masked, classes = Encoder(), [], []
    for found in rows:
        x_LD = encoder.table[found["inputs"]] + encoder.places[found["positions"]]
        if "token_types" in found:
            x_LD += 0.1 * found["token_types"][:, None]
        for at, target, weight in zip(
            found["masked_positions"], found["targets"], found["weights"], strict=True
        ):
            if weight:
                masked.append(-scipy.special.log_softmax(x_LD[at] @ encoder.out)[target])
        if "is_next" in found:
            scores = (x_LD[0] + x_LD[5]) @ encoder.pool
            # Class 0 is "B follows" (create_pretraining_data.py: 1 if is_random_next).
            classes.append(-scipy.special.log_softmax(scores)[0 if found["is_next"] else 1])
    return np.mean(masked), np.mean(classes or [0])


def test_loss_covers_the_masked_tokens_only():
    rows = many(Masked(ByteTokenizer(), 24), window(np.repeat([1, 2, 0], [9, 6, 7])), 4)
    encoder = Encoder()
    sums = jax.jit(lambda batch: Masked(ByteTokenizer(), 24).loss(encoder, batch))(batch_of(rows))
    assert float(sums.weight) == 4 * round(0.15 * 15)
    assert float(sums.loss / sums.weight) == pytest.approx(means(rows)[0], rel=1e-5)


def test_loss_adds_the_mean_of_the_classes_to_that_of_the_tokens():
    rows = pairs(6)
    objective = Masked(ByteTokenizer(), 24, next_sentence=True)
    loss = jax.jit(lambda batch: objective.loss(Encoder(), batch))
    sums = loss(batch_of(rows))
    of_tokens, of_classes = means(rows)
    mean = {name: float(value / sums.weight) for name, value in sums.metrics.items()}
    assert float(sums.loss / sums.weight) == pytest.approx(of_tokens + of_classes, rel=1e-5)
    assert mean["nll"] == pytest.approx(of_tokens, rel=1e-5)
    assert mean["next_sentence_nll"] == pytest.approx(of_classes, rel=1e-5)
    assert 0 <= mean["next_sentence_accuracy"] <= 1
    empty = jax.tree.map(np.zeros_like, rows[0])
    halves = [*rows[:2], *[empty] * 4], [*rows[2:], *[empty] * 2]
    added = jax.tree.map(jnp.add, *(loss(batch_of(half)) for half in halves))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), added, sums)
