"""Parts of a source: documents and errors do not depend on the division."""

import gzip
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.config import default
from lm.data import file_parts
from lm.data.dataset import open_corpus
from lm.errors import UserError

LINES = st.lists(st.text("aé \r\u2028{\n", max_size=12), min_size=1, max_size=12)


def corpus_of(spec, folder, **options):
    data = default().data
    data.directory = str(folder)
    data.cache_directory = str(folder / "cache")
    data.update(options)
    return open_corpus(spec, data, "train")


@settings(max_examples=60)
@given(lines=LINES, size=st.integers(1, 40), mark=st.booleans(), jsonl=st.booleans())
def test_ranges_of_lines_hold_the_documents_of_the_file(tmp_path_factory, lines, size, mark, jsonl):
    folder = tmp_path_factory.mktemp("lines")
    rows = [json.dumps({"text": text}) for text in lines] if jsonl else lines
    text = "\ufeff" * mark + "\n".join([*rows, "" if mark else '{"text": "last"}'])
    (folder / "a.txt").write_bytes(text.encode())
    (folder / "b.txt").write_bytes(b'{"text": "another"}')
    spec = "jsonl:*.txt" if jsonl else "text:*.txt"
    corpus = corpus_of(spec, folder, documents="line")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_parts, "RANGE", size)
        parts = pickle.loads(pickle.dumps(corpus.parts()))
    assert len(parts) > 2 or len(text.encode()) <= 2 * size
    assert sum(part.size for part in parts) == len(text.encode()) + 19
    assert len({part.name for part in parts}) == len(parts)
    assert [chunk for part in parts for chunk in part.chunks()] == list(corpus.chunks())


def test_compressed_files_and_whole_files_are_a_part_each(tmp_path, monkeypatch):
    monkeypatch.setattr(file_parts, "RANGE", 4)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    (tmp_path / "b.txt").write_text("three\nfour\n")
    parts = corpus_of("text:*", tmp_path, documents="file").parts()
    assert [part.name for part in parts] == ["a.txt.gz", "b.txt"]
    assert [[chunk.text for chunk in part.chunks()] for part in parts] == [
        ["one\ntwo\n"],
        ["three\nfour\n"],
    ]
    parts = corpus_of("text:*", tmp_path, documents="line").parts()
    assert [part.name for part in parts][:2] == ["a.txt.gz", "b.txt[0:3]"]


@pytest.mark.parametrize("size", [3, 11, 16, 64])
def test_bad_line_of_a_range_is_named_by_its_number(tmp_path, monkeypatch, capsys, size):
    monkeypatch.setattr(file_parts, "RANGE", size)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n{"text": 3}\n')
    corpus = corpus_of("jsonl:a.jsonl", tmp_path)
    with pytest.raises(UserError, match=r"a\.jsonl:4: field 'text' is of type int"):
        [list(part.chunks()) for part in corpus.parts()]
    corpus = corpus_of("jsonl:a.jsonl", tmp_path, bad_rows="skip")
    texts = [chunk.text for part in corpus.parts() for chunk in part.chunks()]
    assert texts == ["one", "two"]
    assert "1 bad lines skipped, the first: " in (said := capsys.readouterr().err)
    assert "a.jsonl:4" in said


def test_byte_that_is_not_utf8_is_named_by_its_place_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(file_parts, "RANGE", 5)
    (tmp_path / "a.txt").write_bytes(b"one two\nthree\nfo\xffur\n")
    with pytest.raises(UserError, match="not UTF-8 at byte 16: convert"):
        [
            list(part.chunks())
            for part in corpus_of("text:a.txt", tmp_path, documents="line").parts()
        ]
