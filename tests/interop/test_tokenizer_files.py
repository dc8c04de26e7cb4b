"""Tokenizers of model folders, and ours as `transformers` reads them."""

import functools
import io
import json
import tempfile
from pathlib import Path

import pytest
import sentencepiece as sentencepiece_package
from hf_models import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lm.data.tokenizers.basic import ByteTokenizer, CharTokenizer, WordTokenizer
from lm.data.tokenizers.hf import Gpt2Tokenizer
from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from lm.errors import UserError
from lm.interop.tokenizer_files import read_tokenizer, write_tokenizer

TEXTS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
    "def f(x):\n    return  x + 1\t# naïve — ok\n\n\n",
    " two  spaces ",
    "größer, 東京 and 🙂",
    "",
]
MERGES = [("h", "e"), ("t", "he"), ("Ġ", "the"), ("a", "n"), ("an", "d"), ("i", "n")]


def gpt2():
    letters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(68)]
    pieces = [*letters, *("".join(pair) for pair in MERGES), "<|endoftext|>"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in MERGES) + "\n"
    return Gpt2Tokenizer(
        json.dumps({piece: i for i, piece in enumerate(pieces)}).encode(), merges.encode()
    )


def sentencepiece(kind):
    return SentencePieceTokenizer(train_sentencepiece(TEXTS * 20, 310, kind))


TOKENIZERS = {
    "byte": ByteTokenizer,
    "char": lambda: CharTokenizer.fit(TEXTS),
    "gpt2": gpt2,
    "sentencepiece bpe": lambda: sentencepiece("bpe"),
    "sentencepiece unigram": lambda: sentencepiece("unigram"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_transformers_gives_the_same_ids_and_texts(name, tmp_path):
    ours = TOKENIZERS[name]()
    assert write_tokenizer(ours, tmp_path, "decoder", None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == ours.encode(text).tolist(), text
        assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.bos_token_id == ours.bos_id
    assert theirs.eos_token_id == ours.eos_id
    assert len(theirs) == ours.vocab_size


@pytest.mark.parametrize("name", TOKENIZERS)
def test_written_value_is_read_back(name, tmp_path):
    ours = TOKENIZERS[name]()
    write_tokenizer(ours, tmp_path, "decoder", None)
    again = read_tokenizer(tmp_path)
    for text in TEXTS:
        assert again.encode(text).tolist() == ours.encode(text).tolist()


def test_words_have_no_equivalent(tmp_path):
    assert not write_tokenizer(WordTokenizer.fit(TEXTS), tmp_path, "decoder", None)


def test_files_of_older_folders_are_read(tmp_path):
    assert read_tokenizer(tmp_path) is None
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "little", "girl", "##s", ".", "Lily"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    assert read_tokenizer(tmp_path).encode("Little girls.").tolist() == [5, 6, 7, 8]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert read_tokenizer(tmp_path).encode("Lily girls little").tolist() == [9, 6, 7, 5]
    made = gpt2()
    (tmp_path / "vocab.json").write_bytes(made.encoder)
    (tmp_path / "merges.txt").write_bytes(made.merges)
    assert read_tokenizer(tmp_path).encode("in the").tolist() == made.encode("in the").tolist()
    model = sentencepiece("bpe")
    (tmp_path / "spiece.model").write_bytes(model.model)
    assert read_tokenizer(tmp_path).base.digest == model.digest


def test_damaged_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizers JSON file"):
        read_tokenizer(tmp_path)


@functools.cache
def pieces_and_export(kind, settings):
    model = io.BytesIO()
    sentencepiece_package.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS[:1] * 40, *SENTENCES * 10]),
        model_writer=model,
        vocab_size=90,
        hard_vocab_limit=False,
        model_type=kind,
        minloglevel=3,
        **dict(settings),
    )
    ours = SentencePieceTokenizer(model.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        assert write_tokenizer(ours, Path(folder), "decoder", None)
        return ours, transformers.AutoTokenizer.from_pretrained(folder)


SENTENCES = ["the (dog) ran, the <sep> cat sat - and ran"]
SYMBOLS = ("user_defined_symbols", ("<sep>", "(", "((", "-"))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [
        (),
        (SYMBOLS,),
        (SYMBOLS, ("add_dummy_prefix", False)),
        (("treat_whitespace_as_suffix", True),),
        (SYMBOLS, ("treat_whitespace_as_suffix", True)),
        (("normalization_rule_name", "identity"),),
        (("normalization_rule_name", "identity"), ("remove_extra_whitespaces", False)),
        (("normalization_rule_name", "nfkc_cf"), SYMBOLS),
    ],
)
@settings(deadline=None, max_examples=60)
@given(text=st.text(st.sampled_from("the dogcat  (-p<>)\n\t\u3000ﬁÉ🙂"), max_size=24))
@example(text="\nhello\n")
@example(text=" a<sep>b ((c <sep> d ")
@example(text="<sep>")
@example(text="   ")
@example(text="<s>a</s> <unk><0x41> <sep><s>")
def test_sentencepiece_models_of_every_kind_go_out_exactly(kind, options, text):
    ours, theirs = pieces_and_export(kind, options)
    expected = ours.encode(text).tolist()
    assert theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids == expected
