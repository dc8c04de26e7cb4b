import io
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from lm.data.tokenizers.basic import ByteTokenizer, CharTokenizer
from lm.data.tokenizers.hf import HuggingFaceTokenizer
from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from lm.errors import UserError
from lm.objectives.span_corruption import (
    Denoiser,
    SpanCorruption,
    noise_mask,
    read_denoisers,
    replace_spans,
    text_and_target_length,
)

# 70 tokens: 10 of noise in 3 spans, 60 + 3 + 1 = 64. Own sentinels: 257 … 356.
BYTES = SpanCorruption(ByteTokenizer(), 64)


def window(n_tokens, size=None, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 256, n_tokens).astype(np.int32)
    padding = (0, (size or n_tokens) - n_tokens)
    ones = np.ones(n_tokens, np.int32)
    return {"tokens": np.pad(tokens, padding), "segment_ids": np.pad(ones, padding)}


def t5_pieces():
    """A vocabulary with T5's special ids: pad 0, eos 1, no bos."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c ab bc"] * 9),
        model_writer=model,
        vocab_size=12,
        hard_vocab_limit=False,
        minloglevel=3,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    return SentencePieceTokenizer(model.getvalue())


def with_sentinels(n):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "</s>", "<unk>", "a", *(f"<extra_id_{i}>" for i in reversed(range(n)))]
    ids = {word: i for i, word in enumerate(words)}
    model = tokenizers.models.WordLevel(ids, unk_token="<unk>")
    return HuggingFaceTokenizer(tokenizers.Tokenizer(model).to_str().encode())


@pytest.mark.parametrize(
    ("source", "raw", "targets"),
    [
        (512, 568, 114),  # published: T5's random_spans_helper
        # By hand. 284 tokens: 42.6 → 43 of noise, 14.3 → 14 spans, 241 + 14 + 1 = 256 and
        # 43 + 14 + 1 = 58; 285 tokens: 42.75 → 43, 242 + 14 + 1 = 257 is too long.
        (256, 284, 58),
        # 1137: 170.55 → 171, 57 spans, 966 + 57 + 1 = 1024, 171 + 57 + 1 = 229; 1138: 1025.
        (1024, 1137, 229),
    ],
)
def test_text_fills_the_source(source, raw, targets):
    assert text_and_target_length(source, 0.15, 3.0) == (raw, targets)


def test_example_of_the_paper():
    """Raffel 2020, figure 2: the published pair of source and targets."""
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    noise = np.array([word in ("for", "inviting", "last") for word in words])
    tokens = np.arange(len(words))
    sentinels = np.array([102, 101, 100])
    names = dict(enumerate(words)) | {102: "<X>", 101: "<Y>", 100: "<Z>"}

    def text(ids):
        return " ".join(names[int(i)] for i in ids)

    source = replace_spans(tokens, noise, sentinels)
    targets = replace_spans(tokens, ~noise, sentinels)
    assert text(source) == "Thank you <X> me to your party <Y> week"
    assert text(targets) == "<X> for inviting <Y> last <Z>"


def test_all_masks_with_the_right_counts_are_equally_likely():
    """Of 7 tokens 3 in 2 spans; text in 2 parts of 4: 3 ways, noise in 2 parts of 3: 2 ways."""
    rng = np.random.default_rng(0)
    seen = Counter(tuple(noise_mask(7, 0.4, 1.5, rng).astype(int)) for _ in range(6000))
    assert set(seen) == {
        (0, 1, 0, 0, 0, 1, 1), (0, 0, 1, 0, 0, 1, 1), (0, 0, 0, 1, 0, 1, 1),
        (0, 1, 1, 0, 0, 0, 1), (0, 0, 1, 1, 0, 0, 1), (0, 0, 0, 1, 1, 0, 1),
    }  # fmt: skip
    for count in seen.values():
        assert count == pytest.approx(1000, abs=130)  # 4.5 standard deviations


@given(st.integers(2, 90), st.floats(0.05, 0.9), st.floats(1.0, 5.0), st.integers(0, 2**32 - 1))
def test_mask_has_the_counts_that_the_lengths_assume(length, density, mean_span, seed):
    mask = noise_mask(length, density, mean_span, np.random.default_rng(seed))
    n_noise = min(max(round(length * density), 1), length - 1)
    n_spans = min(max(round(n_noise / mean_span), 1), length - n_noise)
    assert mask.sum() == n_noise
    assert np.count_nonzero(mask[1:] & ~mask[:-1]) == n_spans
    assert (mask[0], mask[-1]) == (False, True)


@given(st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_source_and_targets_together_are_the_text(n_tokens, seed):
    example = window(n_tokens, 70, seed)
    found = BYTES.features(example, np.random.default_rng(seed))
    source = found["source"][found["source_segments"] == 1].tolist()
    targets = found["targets"][found["weights"] == 1].tolist()
    assert source.pop() == targets.pop() == 256
    holes = {}
    for token in targets:
        if token > 256:
            holes[token] = []
            newest = token
        else:
            holes[newest].append(token)
    if n_tokens > 1:
        assert list(holes) == [token for token in source if token > 256]
        assert list(holes) == list(range(356, 356 - len(holes), -1))
        text = [part for token in source for part in holes.get(token, [token])]
        assert text == example["tokens"][:n_tokens].tolist()


def test_full_window_leaves_no_padding():
    objective = SpanCorruption(ByteTokenizer(), 512)
    found = objective.features(window(568), np.random.default_rng(0))
    assert found["source"].shape == (512,)
    assert found["targets"].shape == (114,)
    for name in ("source_segments", "target_segments", "weights"):
        assert (found[name] == 1).all()
    assert found["source"][-1] == found["targets"][-1] == 256


def test_short_window_is_padded_with_zero_weight():
    found = BYTES.features(window(20, 70), np.random.default_rng(0))
    # 20 tokens: 3 of noise in one span; 17 + 1 + 1 and 3 + 1 + 1.
    assert found["source_segments"].tolist() == [1] * 19 + [0] * 45
    assert found["target_segments"].sum() == found["weights"].sum() == 5
    assert not found["source"][19:].any()
    assert not found["targets"][5:].any()


def test_inputs_are_shifted_targets_after_the_start_token():
    tokenizer = t5_pieces()
    objective = SpanCorruption(tokenizer, 64)
    found = objective.features(window(70) | {"tokens": np.full(70, 5)}, np.random.default_rng(0))
    assert found["inputs"][0] == 0  # T5 starts with pad
    np.testing.assert_array_equal(found["inputs"][1:], found["targets"][:-1])
    assert found["targets"][0] == tokenizer.vocab_size + 99  # its <extra_id_0>
    assert found["source"][-1] == 1


def test_t5_needs_a_hundred_rows_after_its_pieces():
    assert SpanCorruption(t5_pieces(), 64).n_extra_ids == 100


def test_sentinels_come_after_a_delimiter_that_the_vocabulary_lacks():
    objective = SpanCorruption(CharTokenizer("abc"), 64)
    found = objective.features(window(70) | {"tokens": np.full(70, 1)}, np.random.default_rng(0))
    assert objective.n_extra_ids == 101
    assert found["targets"][-1] == found["inputs"][0] == 3
    assert found["targets"][0] == 103


def test_long_sources_get_the_sentinels_they_need():
    assert SpanCorruption(t5_pieces(), 2048).n_extra_ids == 114


def test_sentinels_of_the_vocabulary_are_used():
    objective = SpanCorruption(with_sentinels(4), 64)
    found = objective.features(window(70) | {"tokens": np.full(70, 3)}, np.random.default_rng(0))
    assert objective.n_extra_ids == 0
    assert found["targets"][found["targets"] > 3].tolist() == [7, 6, 5]


def test_too_few_sentinels_are_reported():
    with pytest.raises(UserError, match=r"tokenizers vocabulary .* 3 .*mean_span"):
        SpanCorruption(with_sentinels(2), 64).n_extra_ids  # noqa: B018


def test_source_too_short_for_a_span_is_reported():
    with pytest.raises(UserError, match="sequence_length=2"):
        text_and_target_length(2, 0.15, 3.0)


def test_windows_are_contiguous_and_complete(make_store):
    store = make_store([[i % 200 for i in range(n)] for n in (100, 30, 80)])
    examples = BYTES.examples(store, training=False)
    tokens = [e["tokens"][e["segment_ids"] == 1] for e in map(examples.__getitem__, range(3))]
    np.testing.assert_array_equal(np.concatenate(tokens), store.tokens)
    assert [len(t) for t in tokens] == [70, 70, 70]
    assert len(BYTES.examples(store, training=True)) == 3


def test_features_have_the_stated_shapes_and_depend_on_the_generator_only():
    first, again, other = (
        BYTES.features(window(70), np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert {name: (x.shape, x.dtype.name) for name, x in first.items()} == BYTES.shapes
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
    assert (first["source"] != other["source"]).any()
    assert SpanCorruption(None, 64).shapes == BYTES.shapes


def test_loss_covers_the_targets_that_have_weight(make_scorer):
    found = BYTES.features(window(20, 70), np.random.default_rng(0))
    batch = {name: jnp.asarray(x)[None] for name, x in found.items()}
    logits = np.random.default_rng(0).normal(size=(1, len(found["targets"]), 357))
    model = make_scorer(logits)
    sums = BYTES.loss(model, batch)
    ((inputs, _),) = model.calls
    names = ("source", "inputs", "source_segments", "target_segments")
    for given_input, name in zip(inputs, names, strict=True):
        assert given_input is batch[name]
    log_p = logits[0] - np.log(np.exp(logits[0]).sum(-1, keepdims=True))
    expected = -sum(log_p[at, found["targets"][at]] for at in range(5))
    assert float(sums.loss) == pytest.approx(expected, rel=1e-5)
    assert float(sums.weight) == 5


# --- several denoisers

MIXTURE = SpanCorruption(ByteTokenizer(), 64, denoisers=read_denoisers("ul2"))


def test_denoisers_of_ul2():
    """Tay et al. 2022, Table 1: two R, one S, four X; its prefixes are those of the release."""
    found = [(d.prefix, d.density, d.mean_span) for d in read_denoisers("ul2")]
    assert found == [
        ("[NLU]", 0.15, 3), ("[NLU]", 0.15, 8), ("[S2S]", 0.25, 0), ("[NLG]", 0.5, 3),
        ("[NLG]", 0.5, 8), ("[NLG]", 0.15, 64), ("[NLG]", 0.5, 64),
    ]  # fmt: skip


@given(st.integers(1, 57), st.integers(0, 2**32 - 1))
def test_each_denoiser_gives_the_text_in_two_parts(n_tokens, seed):
    example = window(n_tokens, MIXTURE.lengths[0], seed)
    found = MIXTURE.features(example, np.random.default_rng(seed))
    source = found["source"][found["source_segments"] == 1].tolist()
    targets = found["targets"][found["weights"] == 1].tolist()
    prefix = bytes(source[:5]).decode()
    assert prefix in ("[NLU]", "[S2S]", "[NLG]")
    assert source.pop() == targets.pop() == 256
    holes, text = {}, []
    for token in targets:
        if token > 256:
            holes[newest := token] = []
        else:
            holes[newest].append(token)
    for token in source[5:]:
        text += holes.get(token, [token])
    if n_tokens > 1:
        assert text == example["tokens"][:n_tokens].tolist()
        if prefix == "[S2S]":
            assert [token > 256 for token in source[5:]].index(True) == len(source) - 6


def test_windows_fit_whatever_is_drawn():
    n_raw, n_targets = MIXTURE.lengths
    assert n_raw == 64 - 6 - 1  # the end may be one token: a sentinel in its place, and eos
    rng = np.random.default_rng(0)
    found = [MIXTURE.features(window(n_raw), rng) for _ in range(200)]
    sources = [(f["source_segments"].sum(), bytes(f["source"][:5].tolist())) for f in found]
    assert max(n for n, _ in sources) == 63  # its prefix has 5 tokens, not 6
    assert max(f["weights"].sum() for f in found) == n_targets
    share = Counter(prefix for _, prefix in sources)
    assert share[b"[NLG]"] == pytest.approx(200 * 4 / 7, abs=30)
    assert SpanCorruption(None, 64, denoisers=MIXTURE.denoisers).shapes == MIXTURE.shapes


def test_suffix_masks_have_the_mean_density():
    denoiser, rng = Denoiser("", 0.25, 0), np.random.default_rng(0)
    sizes = np.array([denoiser.mask(100, rng).sum() for _ in range(2000)])
    assert (sizes.min(), sizes.max()) == (1, 49)
    assert sizes.mean() == pytest.approx(25, abs=1)


def test_prefix_that_the_vocabulary_has_is_one_token():
    tokenizers = pytest.importorskip("tokenizers")
    ids = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "[R]", "a"])}
    model = tokenizers.models.WordLevel(ids, unk_token="<unk>")
    made = HuggingFaceTokenizer(tokenizers.Tokenizer(model).to_str().encode())
    objective = SpanCorruption(made, 64, denoisers=read_denoisers("[R]:0.15:3"))
    source, _ = objective.corrupt(np.full(20, 4), np.random.default_rng(0))
    assert source[:2].tolist() == [3, 4]


@pytest.mark.parametrize(
    "text", ["R", "R:0.5", "R:2:3", "R:0.5:0.5", "R:x:3", "R:0.5:nan", "ul2,R"]
)
def test_invalid_denoiser_is_reported(text):
    with pytest.raises(UserError, match=r"--config.objective.denoisers: .* is not PREFIX:DENSITY"):
        read_denoisers(text)


def test_no_room_after_a_prefix_is_reported():
    with pytest.raises(UserError, match=r"sequence_length=8 .* use at least 9"):
        SpanCorruption(None, 8, denoisers=MIXTURE.denoisers).shapes  # noqa: B018
