import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lm.config import default
from lm.data.record_store import build_record_store
from lm.data.records import open_records
from lm.data.special_tokens import SpecialTokens, special_tokens
from lm.data.tokenizers.basic import ByteTokenizer
from lm.errors import UserError
from lm.models.encoder import Encoder
from lm.models.transformer_config import TransformerConfig
from lm.objectives.classification import Classification

CLS, SEP = 92, 93
SPECIAL = SpecialTokens(pad=0, bos=90, eos=91, cls=CLS, sep=SEP, mask=94, vocab_size=128)
LABELS = ("bad", "so so", "good")
RNG = np.random.default_rng(0)


@pytest.fixture
def make_store(tmp_path):
    """Makes a store of a TSV file whose lines are given, tokenised as bytes."""

    def make(*lines, labels=LABELS, multi_label=False):
        data = default().data
        data.labels, data.multi_label = ",".join(labels), multi_label
        (tmp_path / "a.tsv").write_text("".join(f"{line}\n" for line in lines))
        records = open_records(f"tsv:{tmp_path}/a.tsv", data)
        return build_record_store(records, ByteTokenizer(), tmp_path / "cache")

    return make


def rows(objective, store):
    examples = objective.examples(store, training=True)
    return [objective.features(examples[i], RNG) for i in range(len(examples))]


def stacked(found):
    return {name: np.stack([row[name] for row in found]) for name in found[0]}


def test_a_text_stands_between_cls_and_sep(make_store):
    store = make_store("label\ttext", "good\tabc", "so so\tabcdefgh")
    row, cut = rows(Classification(8, LABELS, SPECIAL), store)
    a, b, c, d, e, f = map(ord, "abcdef")
    assert row["inputs"].tolist() == [CLS, a, b, c, SEP, 0, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert not row["token_types"].any()
    assert (row["label"], row["weights"]) == (2, 1)
    assert cut["inputs"].tolist() == [CLS, a, b, c, d, e, f, SEP]
    assert cut["label"] == 1


def test_a_pair_has_two_types(make_store):
    store = make_store("label\ttext\ttext2", "bad\tab\txyz")
    (row,) = rows(Classification(10, LABELS, SPECIAL), store)
    a, b, x, y, z = map(ord, "abxyz")
    assert row["inputs"].tolist() == [CLS, a, b, SEP, x, y, z, SEP, 0, 0]
    assert row["token_types"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert row["segment_ids"].tolist() == [1] * 8 + [0] * 2


def truncate_seq_pair(a, b, max_length):
    """google-research/bert, run_classifier.py."""
    a, b = list(a), list(b)
    while len(a) + len(b) > max_length:
        if len(a) > len(b):
            a.pop()
        else:
            b.pop()
    return a, b


@pytest.mark.parametrize("length", [5, 6, 9, 10, 14])
def test_a_pair_too_long_is_cut_as_by_bert(make_store, length):
    sizes = [(n, m) for n in (1, 2, 3, 4, 5, 6, 9) for m in (1, 2, 3, 4, 5, 6, 9)]
    store = make_store(
        "label\ttext\ttext2", *(f"bad\t{'abcdefghi'[:n]}\t{'ABCDEFGHI'[:m]}" for n, m in sizes)
    )
    for record, row in zip(
        store, rows(Classification(length, LABELS, SPECIAL), store), strict=True
    ):
        texts = record.tokens["text"].tolist(), record.tokens["text2"].tolist()
        first, second = truncate_seq_pair(*texts, length - 3)
        expected = [CLS, *first, SEP, *second, SEP]
        assert row["inputs"][row["segment_ids"] == 1].tolist() == expected
        assert row["token_types"].sum() == len(second) + 1


class Model:
    """Scores are given; what the pooled vector is made of is checked."""

    def __init__(self, scores_BC):
        self.scores_BC = scores_BC

    def hidden(self, tokens_BL, positions_BL, segments_BL, types_BL):
        assert positions_BL is None
        self.given = tokens_BL, segments_BL, types_BL
        return "hidden"

    def pooled(self, x_BLD, segments_BL):
        assert x_BLD == "hidden"
        assert segments_BL is self.given[1]
        return "pooled"

    def classify(self, x_BD):
        assert x_BD == "pooled"
        return self.scores_BC


def test_loss_is_nats_of_the_right_class(make_store):
    store = make_store("label\ttext", "good\ta", "bad\tb", "so so\tc")
    batch = stacked(rows(Classification(8, LABELS, SPECIAL), store))
    batch["weights"][1] = 0  # as in a row that fills a batch up
    scores_BC = np.array([[0.5, 1, 2], [3, 1, 0], [2, 0.3, 0.1]], np.float32)
    model = Model(jnp.asarray(scores_BC))
    sums = Classification(8, LABELS, SPECIAL).loss(model, batch)
    assert model.given == (batch["inputs"], batch["segment_ids"], batch["token_types"])
    chances = scipy.special.log_softmax(scores_BC, axis=-1)
    assert float(sums.loss) == pytest.approx(-chances[0, 2] - chances[2, 1], rel=1e-5)
    assert float(sums.weight) == 2
    assert float(sums.metrics["accuracy"]) == 1


def test_without_labels_a_number_is_target_message(make_store):
    store = make_store("label\ttext", "2.5\ta", "-1e0\tb", "4\tc", labels=())
    objective = Classification(8, (), SPECIAL)
    batch = stacked(rows(objective, store))
    assert batch["label"].tolist() == [2.5, -1, 4]
    assert batch["label"].dtype == np.float32
    batch["weights"][2] = 0
    sums = objective.loss(Model(jnp.asarray([[2.0], [1.0], [0.0]])), batch)
    assert float(sums.loss) == pytest.approx(0.5**2 + 2**2)
    assert float(sums.weight) == 2
    assert not sums.metrics


def test_several_labels_have_a_probability_each(make_store):
    lines = ("label\ttext", "good,bad\ta", "so so\tb", "bad, so so,good\tc")
    store = make_store(*lines, multi_label=True)
    objective = Classification(8, LABELS, SPECIAL, multi_label=True, n_outputs=3)
    batch = stacked(rows(objective, store))
    assert batch["label"].tolist() == [[1, 0, 1], [0, 1, 0], [1, 1, 1]]
    batch["weights"][2] = 0
    scores_BC = np.array([[0.5, -1, 2], [3, 1, 0], [2, 0.3, 0.1]], np.float32)
    sums = objective.loss(Model(jnp.asarray(scores_BC)), batch)
    chances = scipy.special.expit(scores_BC)
    right = np.where(batch["label"] > 0, chances, 1 - chances)
    assert float(sums.loss) == pytest.approx(-np.log(right[:2]).mean(-1).sum(), rel=1e-5)
    assert float(sums.metrics["accuracy"]) == 1
    assert objective.answers([store], scores_BC) == ["bad,good", "bad,so so", "bad,so so,good"]
    assert [objective.reference(record) for record in store] == [
        "bad,good",
        "so so",
        "bad,so so,good",
    ]


def test_several_numbers_are_a_target_each(make_store):
    store = make_store("label\ttext", "1,-2\ta", "0.5,4\tb", labels=(), multi_label=True)
    objective = Classification(8, (), SPECIAL, multi_label=True, n_outputs=2)
    batch = stacked(rows(objective, store))
    sums = objective.loss(Model(jnp.asarray([[1.0, 0.0], [0.5, 1.0]])), batch)
    assert float(sums.loss) == pytest.approx((2**2 + 3**2) / 2)
    assert objective.answers([store], np.array([[1.5, 2.0]])) == ["1.5,2"]
    with pytest.raises(UserError, match="a label has 2 numbers instead of 3"):
        rows(Classification(8, (), SPECIAL, multi_label=True, n_outputs=3), store)


def test_the_encoder_knows_the_second_text_by_its_type(make_store):
    """The gradient of the loss reaches the second row of the table of types from pairs only."""
    model = Encoder(
        TransformerConfig(
            n_layers=1, d_model=8, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=8, vocab_size=128,
            max_length=10, token_types=2, n_classes=3,
        )
    )  # fmt: skip
    objective = Classification(10, LABELS, SPECIAL)
    alone = stacked(rows(objective, make_store("label\ttext", "bad\tab")))
    pair = stacked(rows(objective, make_store("label\ttext\ttext2", "bad\tab\txyz")))
    params = nn.meta.unbox(nn.init(objective.loss, model)(jax.random.key(0), pair)["params"])
    loss = nn.apply(objective.loss, model)
    gradient = jax.jit(jax.grad(lambda params, batch: loss({"params": params}, batch).loss))
    for batch, expected in ((alone, [True, False]), (pair, [True, True])):
        found = np.asarray(gradient(params, batch)["types"]["embedding"])
        assert found.any(-1).tolist() == expected


@pytest.mark.parametrize(("labels", "label"), [(LABELS, "bad"), ((), "1")])
def test_features_are_of_the_stated_shapes(make_store, labels, label):
    objective = Classification(8, labels, special_tokens(ByteTokenizer()))
    row = rows(objective, make_store("label\ttext", f"{label}\ta", labels=labels))[0]
    assert {name: (x.shape, x.dtype.name) for name, x in row.items()} == objective.shapes
    assert Classification(8, labels, special_tokens(None)).shapes == objective.shapes
    assert objective.n_extra_ids == 0
    assert Classification(8, labels, SpecialTokens(0, 0, 0, 20, 20, 0, 20)).n_extra_ids == 1


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["text", "a"], r"a record has no label \(it has text\)"),
        (["source\tlabel", "a\tbad"], r"no text \(it has source, label\): name the columns"),
    ],
)
def test_records_without_text_or_label_are_said(make_store, lines, words):
    store = make_store(*lines)
    with pytest.raises(UserError, match=words):
        Classification(8, LABELS, SPECIAL).examples(store, training=True)


def test_a_row_too_short_is_said():
    with pytest.raises(UserError, match="sequence_length=4 leaves no room"):
        Classification(4, LABELS, SPECIAL)
