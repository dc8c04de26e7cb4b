"""Tokenizers are fitted to a bounded sample of a large corpus, or to all of a small one."""

import pytest

import lm.data.fit_sample
import lm.data.tokenizer
from lm.data.dataset import open_tokenizer
from lm.data.fit_sample import read_sample


@pytest.fixture
def files(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(f"word{number} " * 500)
    return tmp_path


def words(tokenizer):
    return {int(word.removeprefix("word")) for word in tokenizer.words if word.startswith("word")}


@pytest.mark.parametrize("validation_fraction", [0.0, 0.1])
def test_words_come_from_a_sample_of_a_large_corpus(
    files, make_data, monkeypatch, capsys, validation_fraction
):
    data = make_data(
        source="text:*.txt", tokenizer="words", validation_fraction=validation_fraction
    )
    monkeypatch.setattr(lm.data.tokenizer, "MOST_TO_FIT", 20_000)
    monkeypatch.setattr(lm.data.fit_sample, "_LEAST", 4_000)
    tokenizer = open_tokenizer(data)
    found = words(tokenizer)
    assert len(found) in (5, 6)
    assert found != set(range(len(found)))
    (said,) = files.glob("cache/tokenizers/*/sample.txt")
    assert "parts of text:*.txt" in said.read_text()
    assert said.read_text().strip() in capsys.readouterr().err
    open_tokenizer(data)
    assert not capsys.readouterr().err  # from the cache


def test_small_corpus_is_fitted_to_whole(files, make_data, capsys):
    data = make_data(source="text:*.txt", tokenizer="words")
    assert words(open_tokenizer(data)) == set(range(20))
    assert not capsys.readouterr().err
    assert not list(files.glob("cache/tokenizers/*/sample.txt"))


def test_alphabet_needs_the_whole_corpus(files, make_data, monkeypatch):
    monkeypatch.setattr(lm.data.tokenizer, "MOST_TO_FIT", 20_000)
    data = make_data(source="text:*.txt", tokenizer="char")
    assert open_tokenizer(data).alphabet == "".join(sorted(set("word 0123456789")))


def test_same_sources_give_the_same_sample(files, make_data, tmp_path):
    from lm.data.dataset import open_sources

    sources = open_sources(["text:*.txt"], make_data(), "train", columns=())
    one, two = (list(read_sample(sources, 10_000, tmp_path)) for _ in range(2))
    assert one == two
    assert 10_000 <= sum(map(len, one)) < 20_000
