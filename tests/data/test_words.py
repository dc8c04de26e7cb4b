import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data.dataset import open_corpus, open_tokenizer
from lm.data.store import build_token_store
from lm.data.tokenizers.basic import WordTokenizer
from lm.errors import UserError

TEXT = "the cat saw the dog\n\n <unk> saw <unk> the  end\n"


def test_words_are_numbered_by_falling_frequency_after_the_specials():
    tokenizer = WordTokenizer.fit([TEXT])
    assert tokenizer.words == ("<eos>", "<unk>", "the", "saw", "cat", "dog", "end")
    assert tokenizer.counts == (3, 2, 3, 2, 1, 1, 1)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (7, None, 0)
    assert tokenizer.encode(TEXT).tolist() == [2, 4, 3, 2, 5, 0, 0, 1, 3, 1, 2, 6, 0]
    assert tokenizer.token_id("cat") == 4
    assert tokenizer.token_id("<eos>") == 0
    assert tokenizer.token_id("cow") is None


@pytest.mark.parametrize("changes", [{"vocab_size": 4}, {"min_count": 2}])
def test_rare_words_are_unknown_and_counted_as_such(changes):
    tokenizer = WordTokenizer.fit([TEXT], **changes)
    assert tokenizer.words == ("<eos>", "<unk>", "the", "saw")
    assert tokenizer.counts == (3, 5, 3, 2)
    assert tokenizer.encode("the cow saw").tolist() == [2, 1, 3]


def test_text_does_not_encode_to_the_end_of_a_line():
    tokenizer = WordTokenizer.fit(["a <eos> <eos>"])
    assert tokenizer.words == ("<eos>", "<unk>", "a")
    assert tokenizer.counts == (0, 2, 1)
    assert tokenizer.encode("<eos> a").tolist() == [1, 2]


def test_lower_casing_is_part_of_the_vocabulary():
    tokenizer = WordTokenizer.fit(["Die DIE die <UNK>"], lowercase=True)
    copy = WordTokenizer.from_files(tokenizer.files())
    assert copy.words == ("<eos>", "<unk>", "die")
    assert copy.counts == (0, 1, 3)
    assert copy.encode("dIe").tolist() == [2]
    assert copy.digest != WordTokenizer(copy.words, copy.counts).digest


@given(st.text("ab <unk>\n\t\u3000\u2028é", max_size=40))
def test_counts_match_the_encoded_text_and_decoding_keeps_the_words(text):
    tokenizer = WordTokenizer.fit([text])
    ids = tokenizer.encode(text)
    assert np.bincount(ids, minlength=tokenizer.vocab_size).tolist() == list(tokenizer.counts)
    lines = "\n".join(" ".join(line.split()) for line in text.split("\n"))
    assert tokenizer.decode(ids) == lines
    assert WordTokenizer.from_files(tokenizer.files()) == tokenizer


def test_text_file_has_one_eos_a_line_and_no_more(make_data, tmp_path):
    (tmp_path / "wiki.txt").write_text(" \n = Title = \n \n a <unk> b \n")
    data = make_data(source="text:wiki.txt", tokenizer="words")
    tokenizer = open_tokenizer(data)
    assert tokenizer.words == ("<eos>", "<unk>", "=", "Title", "a", "b")
    for documents, expected in (
        ("file", [0, 2, 3, 2, 0, 0, 4, 1, 5, 0]),
        ("line", [2, 3, 2, 0, 4, 1, 5, 0]),
    ):
        corpus = open_corpus("text:wiki.txt", make_data(documents=documents), "train")
        assert build_token_store(corpus, tokenizer, tmp_path).tokens.tolist() == expected


def test_config_limits_a_fitted_vocabulary(make_data, tmp_path):
    (tmp_path / "a.txt").write_text("A a a B b c\n")
    data = make_data(source="text:a.txt", tokenizer="words")
    for changes, expected in (
        ({}, ["a", "A", "B", "b", "c"]),
        ({"tokenizer_vocab_size": 4}, ["a", "A"]),
        ({"tokenizer_min_count": 2}, ["a"]),
        ({"lowercase": True}, ["a", "b", "c"]),
    ):
        data = make_data(source="text:a.txt", tokenizer="words", **changes)
        assert open_tokenizer(data).words[2:] == tuple(expected)


def test_list_of_words_is_a_vocabulary(make_data, tmp_path):
    (tmp_path / "plain.txt").write_text("the\ncat\n")
    (tmp_path / "counted.txt").write_bytes(b"cat 3\r\n<unk> 7\r\n<eos>\t2")
    plain = open_tokenizer(make_data(tokenizer="words:plain.txt", lowercase=True))
    assert plain.words == ("<eos>", "<unk>", "the", "cat")
    assert plain.counts == (0, 0, 0, 0)
    assert plain.encode("The dog").tolist() == [2, 1]
    counted = open_tokenizer(make_data(tokenizer="words:counted.txt"))
    assert counted.words == ("cat", "<unk>", "<eos>")
    assert counted.counts == (3, 7, 2)
    assert (counted.eos_id, counted.unknown_id) == (2, 1)
    assert counted.encode("cat\ndog").tolist() == [0, 2, 1]
    with pytest.raises(UserError, match=r"none\.txt"):
        open_tokenizer(make_data(tokenizer="words:none.txt"))
