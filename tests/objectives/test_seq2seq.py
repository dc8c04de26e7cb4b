from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import default
from lm.data.record_store import build_record_store
from lm.data.records import open_records
from lm.data.special_tokens import SpecialTokens, special_tokens
from lm.data.tokenizers.basic import ByteTokenizer
from lm.errors import UserError
from lm.models.classic.lstm import RecurrentConfig
from lm.models.classic.recurrent import LstmEncoderDecoder
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.transformer_config import TransformerConfig
from lm.objectives.seq2seq import Seq2Seq

BOS, EOS, VOCAB = 126, 127, 128
SPECIAL = SpecialTokens(pad=0, bos=BOS, eos=EOS, cls=0, sep=0, mask=0, vocab_size=VOCAB)
RNG = np.random.default_rng(0)
# No letter occurs in two pairs, or in a source and a target.
PAIRS = [("abc", "AB"), ("de", "CDEF"), ("f", "G"), ("ghijkl", "HI"), ("mn", "J"), ("o", "KLM")]


@pytest.fixture
def make_store(tmp_path):
    """Make a store of pairs, tokenized as bytes."""

    def make(pairs):
        for side in (0, 1):
            (tmp_path / str(side)).write_text("".join(f"{pair[side]}\n" for pair in pairs))
        records = open_records(f"parallel:{tmp_path}/0|{tmp_path}/1", default().data)
        return build_record_store(records, ByteTokenizer(), tmp_path / "cache")

    return make


def rows(objective, store):
    examples = objective.examples(store, training=True)
    return [objective.features(examples[i], RNG) for i in range(len(examples))]


def stacked(found):
    return {name: np.stack([row[name] for row in found]) for name in found[0]}


def test_pairs_are_packed_consecutively(make_store):
    store = make_store([("abc", "xy"), ("d", "z")])
    row = Seq2Seq(8, 7, SPECIAL).features({"records": list(store)}, RNG)
    a, b, c, d, x, y, z = map(ord, "abcdxyz")
    expected = {
        "source": [a, b, c, EOS, d, EOS, 0, 0],
        "source_segments": [1, 1, 1, 1, 2, 2, 0, 0],
        "source_positions": [0, 1, 2, 3, 0, 1, 0, 0],
        "inputs": [BOS, x, y, BOS, z, 0, 0],
        "targets": [x, y, EOS, z, EOS, 0, 0],
        "target_segments": [1, 1, 1, 2, 2, 0, 0],
        "target_positions": [0, 1, 2, 0, 1, 0, 0],
        "weights": [1, 1, 1, 1, 1, 0, 0],
    }
    assert {name: values.tolist() for name, values in row.items()} == expected


def test_pair_too_long_for_a_row_is_truncated_and_ends_with_eos(make_store):
    for pack in (True, False):
        (row,) = rows(Seq2Seq(4, 3, SPECIAL, pack=pack), make_store([("abcdef", "uvwx")]))
        assert row["source"].tolist() == [*map(ord, "abc"), EOS]
        assert row["inputs"].tolist() == [BOS, *map(ord, "uv")]
        assert row["targets"].tolist() == [*map(ord, "uv"), EOS]


def test_prefix_is_input_but_not_a_target(make_store):
    """Two pairs of 2 + 2 + 1 target tokens, the ends included, fill a row; a third is cut."""
    prefix = (100, 101)
    objective = Seq2Seq(8, 10, SPECIAL, prefix=prefix)
    cut, row = rows(objective, make_store([("a", "xy"), ("b", "zw"), ("c", "0123456789")]))
    assert row["inputs"].tolist() == [BOS, *prefix, *b"xy", BOS, *prefix, *b"zw"]
    assert row["targets"].tolist() == [*prefix, *b"xy", EOS, *prefix, *b"zw", EOS]
    assert row["weights"].tolist() == [0, 0, 1, 1, 1] * 2
    assert cut["targets"].tolist() == [*prefix, *b"0123456", EOS]
    config = default()
    config.data.target_prefix, config.data.target_length = "<none>", 1
    with pytest.raises(UserError, match="no token '<none>'"):
        Seq2Seq.from_config(config, ByteTokenizer())
    with pytest.raises(UserError, match="target_length=1 has no room for the 1 tokens"):
        Seq2Seq.from_config(config, None)


@pytest.mark.parametrize(("pack", "n_rows"), [(True, 3), (False, 6)])
def test_every_pair_is_in_one_row_and_rows_are_full(make_store, pack, n_rows):
    """Six pairs of 21 source and 19 target tokens, ends included: three rows of 8 hold them."""
    found = rows(Seq2Seq(8, 8, SPECIAL, pack=pack), make_store(PAIRS))
    pairs = [
        tuple(
            "".join(map(chr, row[name][row[segments] == segment][:-1]))
            for name, segments in (("source", "source_segments"), ("targets", "target_segments"))
        )
        for row in found
        for segment in range(1, row["source_segments"].max() + 1)
    ]
    assert sorted(pairs) == sorted(PAIRS)
    assert len(found) == n_rows


def transformer():
    return EncoderDecoder(
        TransformerConfig(
            n_layers=1, d_model=8, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=8, vocab_size=VOCAB,
            max_length=12, tie_embeddings=False, init_std=0.5,
        )
    )  # fmt: skip


def recurrent():
    return LstmEncoderDecoder(
        RecurrentConfig(1, 8, 8, VOCAB, bidirectional=True, tie_embeddings=False, init_std=0.5)
    )


@pytest.fixture(params=[transformer, recurrent])
def loss_of(request):
    """The sums of a batch, as a function of parameters, and parameters."""
    model, objective = request.param(), Seq2Seq(12, 12, SPECIAL)
    batch = {
        name: np.zeros((1, *shape), dtype) for name, (shape, dtype) in objective.shapes.items()
    }
    init = nn.init(objective.loss, model)
    params = nn.meta.unbox(init(jax.random.key(0), batch)["params"])
    apply = nn.apply(objective.loss, model)
    return lambda params, batch: apply({"params": params}, batch), params


def test_target_has_no_gradient_from_another_pair(make_store, loss_of):
    loss, params = loss_of
    store = make_store(PAIRS[:3])
    row = Seq2Seq(12, 12, SPECIAL).features({"records": list(store)}, RNG)

    def of_pair(params, segment):
        weights = jnp.where(row["target_segments"] == segment, 1.0, 0.0)
        batch = {name: jnp.asarray(values)[None] for name, values in row.items()}
        return loss(params, batch | {"weights": weights[None]}).loss

    gradient = jax.jit(jax.grad(of_pair))
    for segment, pair in enumerate(PAIRS[:3], start=1):
        found = np.asarray(gradient(params, segment)["tokens"]["embedding"]).any(-1)
        letters = [chr(i) for i in np.flatnonzero(found) if i not in (BOS, EOS)]
        assert letters == sorted("".join(pair))
        assert found[[BOS, EOS]].all()


def test_packing_does_not_change_the_loss(make_store, loss_of):
    loss, params = loss_of
    store = make_store(PAIRS)
    packed, alone = (
        jax.jit(loss)(params, stacked(rows(Seq2Seq(12, 12, SPECIAL, pack=pack), store)))
        for pack in (True, False)
    )
    assert float(packed.weight) == float(alone.weight) == 19
    assert float(packed.loss) == pytest.approx(float(alone.loss), rel=1e-5)
    assert float(packed.metrics["accuracy"]) == float(alone.metrics["accuracy"])


class Logits:
    """A model with given logits."""

    def __init__(self, logits_BTV):
        self.logits_BTV = logits_BTV
        self.config = SimpleNamespace(loss_chunk=0)

    def decoder_hidden(self, *inputs):
        return jnp.zeros((2, 4, 1))

    def logits(self, x_BTD):
        return self.logits_BTV


def test_loss_is_smoothed_nats_of_all_targets(make_store):
    logits = np.random.default_rng(0).normal(size=(2, 4, VOCAB)).astype(np.float32)
    objective = Seq2Seq(4, 4, SPECIAL, pack=False, label_smoothing=0.2, z_loss=0.1)
    batch = stacked(rows(objective, make_store([("a", "xy"), ("b", "z")])))
    sums = objective.loss(Logits(jnp.asarray(logits)), batch)
    total = nll = 0.0
    for row, at in zip(*np.nonzero(batch["weights"]), strict=True):
        scores = logits[row, at].astype(np.float64)
        log_z = np.log(np.exp(scores).sum())
        nats = log_z - scores[batch["targets"][row, at]]
        nll += nats
        total += 0.8 * nats + 0.2 * (log_z - scores.mean()) + 0.1 * log_z**2
    assert float(sums.weight) == 5
    assert float(sums.loss) == pytest.approx(total, rel=1e-5)
    assert float(sums.metrics["nll"]) == pytest.approx(nll, rel=1e-5)


def test_features_have_the_stated_shapes(make_store):
    objective = Seq2Seq(12, 10, special_tokens(ByteTokenizer()))
    row = rows(objective, make_store(PAIRS))[0]
    assert {name: (x.shape, x.dtype.name) for name, x in row.items()} == objective.shapes
    assert Seq2Seq(12, 10, special_tokens(None)).shapes == objective.shapes
    assert objective.n_extra_ids == 0
    assert Seq2Seq(9, 9, SpecialTokens(20, 20, 20, 0, 0, 0, vocab_size=20)).n_extra_ids == 1


def test_records_without_a_target_are_reported(tmp_path):
    (tmp_path / "a.tsv").write_text("source\tx\nb\ty\n")
    records = open_records(f"tsv:{tmp_path}/a.tsv", default().data)
    store = build_record_store(records, ByteTokenizer(), tmp_path)
    with pytest.raises(UserError, match=r"a record has no target \(it has source\).*data\.columns"):
        Seq2Seq(9, 9, SPECIAL).examples(store, training=True)
