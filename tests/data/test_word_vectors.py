import gzip

import numpy as np
import pytest

from lm.data.tokenizers.basic import CharTokenizer
from lm.data.word_vectors import (
    WordVectors,
    load_vectors,
    pretrained_embeddings,
    save_vectors,
    vocabulary_words,
)
from lm.errors import UserError

GLOVE = "the 0.5 -1e-2 3\n, 1 2 3\n"
EXPECTED = np.float32([[0.5, -0.01, 3], [1, 2, 3]])


def write(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["vectors.txt", "vectors.txt.gz"])
@pytest.mark.parametrize("header", ["", "2 3\n"])
def test_glove_and_word2vec_text_plain_or_compressed(tmp_path, name, header):
    vectors = load_vectors(write(tmp_path / name, header + GLOVE))
    assert vectors.words == ("the", ",")
    assert vectors.vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors.vectors, EXPECTED)


def test_spaces_that_word2vec_writes_at_line_ends_do_not_matter(tmp_path):
    path = write(tmp_path / "v.txt", "2 3\nthe 0.5 -0.01 3 \n, 1 2 3 \n")
    np.testing.assert_array_equal(load_vectors(path).vectors, EXPECTED)


def test_words_of_the_large_glove_files_may_contain_spaces_of_all_kinds(tmp_path):
    vectors = load_vectors(write(tmp_path / "v.txt", "the 1 2\n. . . 3 4\n1\u00a01/2\u0085 5 6\n"))
    assert vectors.words == ("the", ". . .", "1\u00a01/2\u0085")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 1 2\nb 1\n", ":2: expected a word and 2 numbers"),
        ("a 1 2\n1 2\n", ":2: expected a word and 2 numbers"),
        ("2 2\na 1 2\nb 1 x\n", ":3: expected a word and 2 numbers"),
        ("a 1 2\n\nb 1 2\n", ":2: expected a word and 2 numbers"),
        ("2 1\na 1\nb nan\n", ":3: the vector contains a non-finite number"),
        ("a 1 2\nb 1 1e99\n", ":2: the vector contains a non-finite number"),
        ("3 2\na 1 2\nb 1 2\n", ":1: announces 3 words, but the file has 2"),
        ("word\n", ":1: expected a word and its vector"),
        ("", ":1: expected a word and its vector"),
    ],
)
def test_bad_row_is_named_with_file_and_line(tmp_path, text, message):
    path = write(tmp_path / "v.txt", text)
    with pytest.raises(UserError) as error:
        load_vectors(path)
    assert str(error.value).startswith(f"{path}{message}")


@pytest.mark.parametrize("name", ["vectors.txt", "vectors.txt.gz"])
def test_saved_vectors_come_back_bitwise(tmp_path, name):
    numbers = np.random.default_rng(0).normal(size=(50, 7)) * np.float32(10) ** np.arange(
        -30, 12, 6
    )
    vectors = WordVectors(tuple(f"wörd{i}" for i in range(50)), numbers.astype(np.float32))
    save_vectors(vectors, tmp_path / name)
    loaded = load_vectors(tmp_path / name)
    assert loaded.words == vectors.words
    np.testing.assert_array_equal(loaded.vectors, vectors.vectors)


@pytest.mark.parametrize("word", ["", "a b", "a\nb"])
def test_word_that_would_not_round_trip_is_not_saved(tmp_path, word):
    with pytest.raises(UserError, match=r"word 2, .* cannot be written"):
        save_vectors(WordVectors(("a", word), np.zeros((2, 3))), tmp_path / "v.txt")
    assert not (tmp_path / "v.txt").exists()


def test_words_are_found_as_written_or_else_lower_cased_and_the_first_of_two():
    vectors = WordVectors(("paris", "Paris", "US", "paris"), np.zeros((4, 1)))
    assert [vectors.row(word) for word in ("paris", "Paris", "PARIS", "us")] == [0, 1, 0, None]


def test_initial_table_copies_found_words_and_draws_the_others():
    vectors = WordVectors(("cat", "dog"), np.float32([[1, 2], [3, 4]]))
    words = ["", "Dog", *map(str, range(2000)), "cat"]
    table, found = pretrained_embeddings(vectors, words, rows=2010, std=0.1, seed=3)
    assert table.shape == (2010, 2)
    assert table.dtype == np.float32
    assert found == 2
    np.testing.assert_array_equal(table[[1, 2002]], [[3, 4], [1, 2]])
    others = np.delete(table, [1, 2002], axis=0)
    assert len(np.unique(others)) == others.size
    assert others.std() == pytest.approx(0.1, rel=0.05)
    assert abs(others.mean()) < 0.01
    np.testing.assert_array_equal(pretrained_embeddings(vectors, words, 2010, 0.1, 3)[0], table)
    assert (pretrained_embeddings(vectors, words, 2010, 0.1, 4)[0] != table).any()


def test_words_of_a_tokenizer():
    assert vocabulary_words(CharTokenizer.fit(["b a"])) == ["", "a", "b"]
