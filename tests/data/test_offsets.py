import io
import re

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from lm.data.record_store import tokenize_with_offsets
from lm.data.tokenizers.basic import ByteTokenizer, WordTokenizer
from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer


def words_of(text):
    """The words that the tokens of a text stand for, each once."""
    located = tokenize_with_offsets(text, ByteTokenizer().encode)
    borders = dict.fromkeys(zip(located.starts.tolist(), located.ends.tolist(), strict=True))
    return [text[start:end] for start, end in borders]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  Bell's 3.5% (NFL)\n", ["Bell", "'", "s", "3", ".", "5", "%", "(", "NFL", ")"]),
        ("黑豹队 308分。", ["黑", "豹", "队", "308", "分", "。"]),
        ("cafe\u0301s größer", ["cafe\u0301s", "größer"]),  # an accent of its own
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs
        (" \n ", []),
    ],
)
def test_words_are_runs_of_letters_and_single_marks(text, words):
    assert words_of(text) == words


@given(st.text("ab1 \n,.()é黑の\u0301½_", max_size=30))
def test_every_word_character_is_covered_once_and_in_order(text):
    assert "".join(words_of(text)) == "".join(text.split())
    located = tokenize_with_offsets(text, ByteTokenizer().encode)
    assert located.tokens.dtype == located.starts.dtype == np.int32
    one_space = re.sub(r"\s+", " ", text.rstrip())
    assert ByteTokenizer().decode(located.tokens) == one_space


def test_every_token_has_the_characters_of_its_word():
    located = tokenize_with_offsets("ab, c", ByteTokenizer().encode)
    assert bytes(located.tokens.tolist()) == b"ab, c"
    assert located.starts.tolist() == [0, 0, 2, 4, 4]
    assert located.ends.tolist() == [2, 2, 3, 5, 5]


def test_vocabularies_that_mark_word_starts_do_not_mark_punctuation():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a, ab, (b) ,b"] * 20),
        model_writer=model,
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    text = "ab, (b), ab"
    assert reference.encode(",") != [reference.piece_to_id(",")]  # alone it would have a mark
    tokens = tokenize_with_offsets(text, SentencePieceTokenizer(model.getvalue()).encode).tokens
    assert tokens.tolist() == reference.encode(text)


def test_word_unknown_with_its_neighbor_is_encoded_alone():
    tokenizer = WordTokenizer.fit(["no , yes"])
    found = tokenize_with_offsets("no, zebra yes", tokenizer.encode)
    assert tokenizer.decode(found.tokens) == "no , <unk> yes"
