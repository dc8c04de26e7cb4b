import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import sources
from lm.data.sources import cut_document


def _small_pieces(patch):
    patch.setattr(sources, "CHUNK", 8)
    patch.setattr(sources, "LONGEST_CHUNK", 32)


@settings(deadline=None)
@given(st.text("ab \n", max_size=300), st.lists(st.integers(1, 50)))
def test_pieces_join_to_the_document_and_ignore_how_it_was_read(text, sizes):
    with pytest.MonkeyPatch.context() as patch:
        _small_pieces(patch)
        whole = list(cut_document([text]))
        chunks, start = [], 0
        for size in sizes:
            chunks.append(text[start : start + size])
            start += size
        chunks.append(text[start:])
        assert list(cut_document(chunks)) == whole
    assert "".join(piece.text for piece in whole) == text
    assert all(0 < len(piece.text) <= 32 for piece in whole)
    assert [piece.first for piece in whole] == [i == 0 for i in range(len(whole))]
    assert [piece.last for piece in whole] == [i == len(whole) - 1 for i in range(len(whole))]


def test_splits_follow_a_single_newline_between_words(monkeypatch):
    _small_pieces(monkeypatch)
    text = "one two\n\nthree\nfour\n  five six"
    first, second = cut_document([text])
    assert first.text == "one two\n\nthree\n"
    assert second.text == "four\n  five six"


def test_document_without_newlines_is_still_split(monkeypatch):
    _small_pieces(monkeypatch)
    assert [len(piece.text) for piece in cut_document(["x" * 70])] == [32, 32, 6]
