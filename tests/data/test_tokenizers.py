import builtins
import inspect
import io
import json
import pickle

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lm.data.tokenizers.sentencepiece
from lm.data.dataset import open_tokenizer
from lm.data.tokenizer import load_saved_tokenizer
from lm.data.tokenizers.basic import ByteTokenizer, CharTokenizer, WordTokenizer
from lm.data.tokenizers.hf import Gpt2Tokenizer, HuggingFaceTokenizer
from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from lm.errors import UserError

TRAINING = [inspect.getsource(json.encoder), "\tif größer:\n" * 9, inspect.getsource(json.decoder)]
any_text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def byte_symbols() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def gpt2_files() -> dict[str, bytes]:
    symbols = [*byte_symbols().values(), "he", "Ġhe", "Ġhel", "<|endoftext|>"]
    encoder = {symbol: index for index, symbol in enumerate(symbols)}
    merges = "#version: 0.2\nh e\nĠ he\nĠhe l\n"
    return {"encoder.json": json.dumps(encoder).encode(), "vocab.bpe": merges.encode()}


def word_json() -> bytes:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "hello": 3, "world": 4, "[MASK]": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def pieces():
    return SentencePieceTokenizer(train_sentencepiece(TRAINING, 600))


@pytest.fixture(scope="module")
def all_kinds(pieces):
    return [
        ByteTokenizer(),
        CharTokenizer.fit(["hello world"]),
        pieces,
        HuggingFaceTokenizer(word_json()),
        Gpt2Tokenizer.from_files(gpt2_files()),
        WordTokenizer.fit(["hello world"]),
    ]


@given(any_text)
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode([256, *ids, 256]) == text
    assert len(ids) == len(text.encode())


@given(any_text)
def test_characters_round_trip(text):
    tokenizer = CharTokenizer.fit(["zbé🙂", text])
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_characters_are_numbered_in_sorted_order_and_unknown_ones_named():
    tokenizer = CharTokenizer.fit(["cab", "b\n"])
    assert tokenizer.encode("\nabc").tolist() == [0, 1, 2, 3]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (4, None, None)
    for unknown in ("z", "A", "\t"):
        with pytest.raises(UserError, match=f"U\\+{ord(unknown):04X}"):
            tokenizer.encode("ab" + unknown)


@settings(deadline=None, max_examples=300)
@given(st.one_of(any_text, st.text("\u2581\u2585\u2047 \t\n\r<0xE>/s▁ab", max_size=20)))
@example("  two  spaces  ")
@example("a\u2581b \u2581")
@example("<s></s><unk><0x41>\ufeff")
@example("\n\n\t\n    x\r\n")
def test_our_sentencepiece_keeps_every_text(pieces, text):
    assert pieces.decode(pieces.encode(text)) == text


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_sentencepiece_is_deterministic_and_lossless(model_type):
    model = train_sentencepiece(iter(TRAINING), 600, model_type)
    assert model == train_sentencepiece(iter(TRAINING), 600, model_type)
    tokenizer = SentencePieceTokenizer(model)
    assert tokenizer.vocab_size == 600
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    text = "  x\u2581\n\n\tünseen 漢\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_model_of_lowercased_text_lowercases_by_itself():
    model = train_sentencepiece(["The Cat sat on the Mat\n"] * 20, 290, lowercase=True)
    tokenizer = SentencePieceTokenizer(model)
    assert tokenizer.decode(tokenizer.encode("  THE  Cat\nÜB ")) == "  the  cat\nüb "
    assert not any("T" in piece for piece in tokenizer.pieces() if not piece.startswith("<"))


@settings(deadline=None)
@given(st.text("ab \n", max_size=200))
def test_long_texts_encode_as_in_one_stretch(pieces, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm.data.tokenizers.sentencepiece._STRETCH", 5)
        assert pieces.encode(text).tolist() == pieces._processor.encode(text)


def test_pieces_across_spaces_are_kept_together(monkeypatch):
    monkeypatch.setattr("lm.data.tokenizers.sentencepiece._STRETCH", 5)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(TRAINING).splitlines()),
        model_writer=model,
        vocab_size=900,
        byte_fallback=True,
        model_type="bpe",
        split_by_whitespace=False,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=3,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    text = TRAINING[0]
    assert tokenizer.encode(text).tolist() == tokenizer._processor.encode(text)


def test_sentencepiece_learns_pieces_of_whitespace(pieces):
    assert len(pieces.encode("        ")) == 1
    assert len(pieces.encode(":\n")) == 1


def test_large_text_is_subsampled_deterministically(monkeypatch):
    monkeypatch.setattr("lm.data.tokenizers.sentencepiece._MOST_CHARACTERS", {"bpe": 40 * 500})
    texts = [chr(0x4E00 + i) * 500 for i in range(200)]
    model = train_sentencepiece(texts, 300)
    assert model == train_sentencepiece(texts, 300)
    tokenizer = SentencePieceTokenizer(model)
    sampled = [i for i, text in enumerate(texts) if tokenizer.token_id(text[0]) is not None]
    assert 30 <= len(sampled) <= 40
    assert min(sampled) < 50 < 150 < max(sampled)


def test_impossible_vocabulary_size_is_reported():
    for size in (10, 100_000):
        with pytest.raises(UserError, match=r"tokenizer_vocab_size \(Vocabulary size"):
            train_sentencepiece(["abc " * 50], size)


def test_other_sentencepiece_models_encode_as_sentencepiece_does():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(TRAINING).splitlines()),
        model_writer=model,
        vocab_size=600,
        byte_fallback=True,
        model_type="bpe",
        bos_id=-1,
        eos_id=1,
        unk_id=0,
        minloglevel=3,
    )
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = SentencePieceTokenizer(model.getvalue())
    text = " \u2581 hello  world\n \u2581x"
    assert ours.encode(text).tolist() == reference.encode(text)
    assert (ours.bos_id, ours.eos_id) == (None, 1)


def test_gpt2_merges_as_its_files_say():
    tokenizer = Gpt2Tokenizer.from_files(gpt2_files())
    h, e, l, o = (list(byte_symbols().values()).index(c) for c in "helo")
    assert tokenizer.encode("he hello h e").tolist()[:4] == [256, 258, l, o]
    assert tokenizer.bos_id == tokenizer.eos_id == 259 == tokenizer.vocab_size - 1
    assert tokenizer.encode("eh").tolist() == [e, h]


@settings(deadline=None)
@given(any_text)
def test_gpt2_round_trip_and_text_is_never_special(text):
    tokenizer = Gpt2Tokenizer.from_files(gpt2_files())
    text += "<|endoftext|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids


def test_tokenizers_json_neither_truncates_nor_pads():
    tokenizer = HuggingFaceTokenizer(word_json())
    assert tokenizer.encode("hello world hello none").tolist() == [3, 4, 3, 0]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.token_id("[MASK]")) == (1, 2, 5)
    assert tokenizer.token_id("[NONE]") is None


def test_copies_are_the_same_tokenizer(all_kinds, tmp_path):
    for tokenizer in all_kinds:
        expected = tokenizer.encode("hello world")
        tokenizer.save(tmp_path / tokenizer.kind)
        for copy in (
            pickle.loads(pickle.dumps(tokenizer)),
            load_saved_tokenizer(tmp_path / tokenizer.kind),
        ):
            np.testing.assert_array_equal(copy.encode("hello world"), expected)
            assert copy.digest == tokenizer.digest
            assert (copy.bos_id, copy.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
        assert expected.dtype == np.int32
    assert len({tokenizer.digest for tokenizer in all_kinds}) == len(all_kinds)


def test_changed_or_missing_copy_is_rejected(tmp_path):
    with pytest.raises(UserError, match="no intact tokenizer"):
        load_saved_tokenizer(tmp_path / "none")
    CharTokenizer("abc").save(tmp_path)
    (tmp_path / "alphabet.json").write_text('"abd"')
    with pytest.raises(UserError, match="modified after saving"):
        load_saved_tokenizer(tmp_path)


def test_config_names_each_kind(make_data, tmp_path, all_kinds):
    (tmp_path / "text.txt").write_text("hello world")
    for name, content in gpt2_files().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "word.json").write_bytes(word_json())
    (tmp_path / "a.model").write_bytes(all_kinds[2].model)
    specs = ["byte", "char", "sentencepiece:a.model", "tokenizers:word.json", "gpt2:.", "words"]
    for spec, expected in zip(specs, all_kinds, strict=True):
        opened = open_tokenizer(make_data(source="text:text.txt", tokenizer=spec))
        assert opened.digest == expected.digest


def test_trained_vocabulary_is_cached_by_what_it_was_trained_on(make_data, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("".join(TRAINING))
    first = open_tokenizer(make_data(source="text:a.txt", tokenizer="sentencepiece"))
    assert first.vocab_size == 600
    trained = []

    def train(texts, vocab_size, lowercase):
        trained.append(vocab_size)
        return train_sentencepiece(texts, vocab_size, lowercase=lowercase)

    monkeypatch.setattr(lm.data.tokenizers.sentencepiece, "train_sentencepiece", train)
    again = open_tokenizer(make_data(source="text:a.txt", tokenizer="sentencepiece"))
    assert again.digest == first.digest
    assert trained == []
    data = make_data(source="text:a.txt", tokenizer="sentencepiece", tokenizer_vocab_size=590)
    assert open_tokenizer(data).vocab_size == 590
    path.write_text("".join(TRAINING) + "more")
    open_tokenizer(make_data(source="text:a.txt", tokenizer="sentencepiece"))
    assert trained == [590, 600]


@pytest.mark.parametrize(
    ("spec", "content", "words"),
    [
        ("bpe", None, ["unknown tokenizer 'bpe'", "gpt2:DIR"]),
        ("byte:x", None, ["unknown tokenizer"]),
        ("gpt2", None, ["unknown tokenizer"]),
        ("sentencepiece:no.model", None, ["no.model", "LM_DATA_DIR"]),
        ("sentencepiece:file", b"junk", ["sentencepiece:file", "not a SentencePiece model"]),
        ("tokenizers:file", b"{}", ["tokenizers:file", "not a tokenizers JSON"]),
        ("gpt2:.", None, ["encoder.json"]),
        ("words:file", b"the 1 2\n", ["words:file: line 1 is neither a word nor"]),
        ("words:file", b"the\na 2\nthe 3\n", ["words:file: line 3: the word 'the' occurs twice"]),
        ("words:file", b"\xff", ["words:file: not UTF-8 at byte 0"]),
    ],
)
def test_tokenizer_errors_are_reported(make_data, tmp_path, spec, content, words):
    if content:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError) as error:
        open_tokenizer(make_data(tokenizer=spec))
    for word in words:
        assert word in str(error.value)


def test_missing_package_is_named(make_data, tmp_path, monkeypatch):
    (tmp_path / "a.json").write_bytes(word_json())
    real_import = builtins.__import__

    def without_tokenizers(name, *args, **kwargs):
        if name == "tokenizers":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    with pytest.raises(UserError, match=r"pip install .*\[hf\]"):
        open_tokenizer(make_data(tokenizer="tokenizers:a.json"))
