import io

import numpy as np
import pytest
import sentencepiece

from lm.data.tokenizers.basic import ByteTokenizer, CharTokenizer, WordTokenizer, word_starts
from lm.data.tokenizers.hf import Gpt2Tokenizer, HuggingFaceTokenizer
from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer


def test_every_kind_of_vocabulary_says_where_words_start():
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["[UNK]", "he", "##l", "##lo", "wor", "##ld"]
    model = tokenizers.models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]")
    bert = HuggingFaceTokenizer(tokenizers.Tokenizer(model).to_str().encode())
    assert word_starts(bert).tolist() == [not piece.startswith("##") for piece in pieces]

    pieces = ["a", "#", "Ġ", "##", "Ġa", "Ċ", "<|endoftext|>"]
    encoder = str({piece: i for i, piece in enumerate(pieces)}).replace("'", '"').encode()
    gpt2 = Gpt2Tokenizer(encoder, "#version: 0.2\nĠ a\n# #\n".encode())
    assert [p for p, starts in zip(pieces, word_starts(gpt2), strict=True) if starts] == [
        "Ġ",
        "Ġa",
        "Ċ",
    ]

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c ab bc abc"] * 9),
        model_writer=model,
        vocab_size=14,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    ids = tokenizer.encode("abc bc")
    assert word_starts(tokenizer)[ids].sum() == 2
    assert word_starts(tokenizer).sum() == sum(p.startswith("▁") for p in tokenizer.pieces())

    assert np.flatnonzero(word_starts(ByteTokenizer())).tolist() == [9, 10, 13, 32]
    assert word_starts(CharTokenizer("\n ab")).tolist() == [True, True, False, False]
    words = WordTokenizer.fit(["one two\nthree"])
    assert word_starts(words).all()
