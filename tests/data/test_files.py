"""Users' files: names, links, byte order marks, damage; any content is data or a one-line error."""

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.config import default
from lm.data import file_parts
from lm.data.dataset import open_corpus
from lm.data.file_digests import hash_files
from lm.data.files import find_files, read_text
from lm.data.records import open_records
from lm.data.shared_folder import open_shared_folder
from lm.data.store import build_token_store
from lm.data.tokenizers.basic import ByteTokenizer
from lm.errors import UserError
from lm.storage import cache_directory, chosen_cache


def _data(folder: Path, **options):
    data = default().data
    data.directory = str(folder)
    data.update(options)
    return data


def _texts(spec: str, data) -> list[str]:
    return [chunk.text for chunk in open_corpus(spec, data, "train").chunks()]


def test_links_and_loops_are_read_once(tmp_path, capsys):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "x.txt").write_text("one")
    (tmp_path / "y.txt").write_text("two")
    (tmp_path / "a" / "same.txt").symlink_to(inner / "x.txt")
    for number in range(3):
        (inner / f"loop{number}").symlink_to(tmp_path)
    files = find_files("**/*.txt", _data(tmp_path))
    assert files == (inner / "x.txt", tmp_path / "y.txt")
    assert "a/same.txt: is the same file as" in capsys.readouterr().err
    assert [path.name for path in find_files("a/**", _data(tmp_path))] == ["y.txt", "x.txt"]


@pytest.mark.parametrize("name", ["a,b.txt", "[x]/t.txt", "s*r.txt", "é\udce9.txt", "p q.txt"])
def test_names_that_look_like_something_else(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("text")
    (tmp_path / "star.txt").write_text("another")
    data = _data(tmp_path)
    assert find_files(name, data) == (file,)
    hash_files([file])
    if "/" in name:
        assert find_files("[x]/*.txt", data) == (file,)


def test_commas_in_names_are_escaped():
    from lm.config.registry import listed

    assert listed(r"text:a\,b.txt, text:c,") == ["text:a,b.txt", "text:c"]


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "file.txt/x", "~nobody-of-this-name/x"])
def test_invalid_paths(tmp_path, name):
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(UserError):
        find_files(name, _data(tmp_path))


def test_folder_instead_of_files_is_reported(tmp_path):
    (tmp_path / "corpus").mkdir()
    with pytest.raises(UserError, match=r"corpus: is a folder: name its files, such as .*/\*"):
        find_files("corpus", _data(tmp_path))


def test_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match="cannot be read"):
        find_files("**/*.txt", _data(tmp_path))


def test_no_home(monkeypatch):
    def refuse(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LM_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "expanduser", refuse)
    with pytest.raises(UserError, match="LM_CACHE_DIR"):
        cache_directory(_data(Path(".")))


def test_gzip_by_any_case_and_others_by_name(tmp_path):
    (tmp_path / "a.txt.GZ").write_bytes(gzip.compress(b"hello"))
    (tmp_path / "b.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd\x04\x00A")
    data = _data(tmp_path)
    assert _texts("text:a.txt.GZ", data) == ["hello"]
    with pytest.raises(UserError, match="zstd"):
        _texts("text:b.txt.zst", data)


@pytest.mark.parametrize(
    ("spec", "content", "option"),
    [
        ("text:f", b"hello", {"documents": "file"}),
        ("text:f", b"hello\n", {"documents": "line"}),
        ("jsonl:f", b'{"text": "hello"}\n', {}),
    ],
)
def test_byte_order_mark_is_dropped_and_reported_once(tmp_path, capsys, spec, content, option):
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbf" + content)
    data = _data(tmp_path, **option)
    for _ in range(2):
        assert [text.strip() for text in _texts(spec, data)] == ["hello"]
    assert capsys.readouterr().err.count("byte order mark") == 1


def test_file_that_changes_after_its_digest(tmp_path):
    file = tmp_path / "f.txt"
    file.write_text("one two")
    corpus = open_corpus("text:f.txt", _data(tmp_path), "train")
    assert corpus.digest
    file.write_text("one two three")
    with pytest.raises(UserError, match="changed while it was read"):
        list(corpus.chunks())
    assert _texts("text:f.txt", _data(tmp_path)) == ["one two three"]


_BAD_LINES = [
    '{"text": ' + "9" * 5000 + "}",
    '{"text": null}',
    "[" * 100_000,
    "\0\0\0",
    "[1]",
    '{"other": "x"}',
    "{",
]


@pytest.mark.parametrize("line", _BAD_LINES, ids=range(len(_BAD_LINES)))
def test_bad_lines_are_errors_or_skipped(tmp_path, capsys, line):
    (tmp_path / "f.jsonl").write_text(f'{line}\n{{"text": "good"}}\n')
    with pytest.raises(UserError, match=r"f\.jsonl:1: "):
        _texts("jsonl:f.jsonl", _data(tmp_path))
    assert _texts("jsonl:f.jsonl", _data(tmp_path, bad_rows="skip")) == ["good"]
    assert "1 bad lines skipped" in capsys.readouterr().err


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "text",
                    "label",
                    "data",
                    "paragraphs",
                    "qas",
                    "id",
                    "answers",
                    "context",
                    "question",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
_lines = st.lists(_json.map(json.dumps), max_size=4).map("\n".join).map(str.encode)
_content = st.one_of(
    st.binary(max_size=80),
    _lines,
    st.text('",\t\r\n\0a1{}[]\ud800\ufeff', max_size=40).map(
        lambda text: text.encode("utf-8", "surrogatepass")
    ),
    st.sampled_from(_BAD_LINES).map(str.encode),
)
_KINDS = ["text:f", "jsonl:f", "tsv:f", "csv:f", "squad:f", "parallel:f|f"]


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(_content, st.sampled_from(_KINDS), st.sampled_from(["error", "skip"]), st.booleans())
def test_any_content_is_data_or_one_line(tmp_path, content, spec, bad_rows, header):
    (tmp_path / "f").write_bytes(content)
    data = _data(tmp_path, bad_rows=bad_rows, header=header, documents="line")
    readers = [lambda: list(open_records(spec, data))]
    if spec.startswith(("text", "jsonl")):
        readers.append(lambda: _texts(spec, data))
    if spec.startswith("text"):
        readers = readers[1:]
    for read in readers:
        try:
            for item in read():
                json.dumps(item, ensure_ascii=False).encode()
        except UserError as error:
            problem = str(error)
        else:
            problem = ""
        assert "\n" not in problem


def test_position_of_bytes_that_are_not_text(tmp_path):
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(UserError, match="byte 5"):
        list(read_text(tmp_path / "f"))


def test_store_with_a_flipped_bit_is_built_again(tmp_path, capsys):
    (tmp_path / "f").write_text("some text " * 50)
    data = _data(tmp_path)
    build = lambda: build_token_store(  # noqa: E731
        open_corpus("text:f", data, "train"), ByteTokenizer(), tmp_path / "cache", workers=1
    )
    tokens = build().tokens.copy()
    (file,) = tmp_path.glob("cache/stores/*/tokens.bin")
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    assert (build().tokens == tokens).all()
    assert "tokens.bin does not match its checksum" in capsys.readouterr().err


def test_file_url_is_the_path(make_data, tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "a.txt").write_text("some text")
    url = (folder / "a.txt").as_uri()
    assert "%20" in url
    data = make_data(cache_directory=(tmp_path / "cache").as_uri())
    assert find_files(url, data) == find_files(f"file://{folder}/*", data) == (folder / "a.txt",)
    assert find_files("a.txt", make_data(directory=folder.as_uri())) == (folder / "a.txt",)
    assert cache_directory(data) == tmp_path / "cache"
    assert chosen_cache(data) == str(tmp_path / "cache")
    folder = open_shared_folder(data.cache_directory, "x")
    folder.write("f", b"1")
    assert (tmp_path / "cache" / "x" / "f").read_bytes() == b"1"


def test_large_file_is_not_mistaken_for_an_archive(make_data, tmp_path, monkeypatch):
    monkeypatch.setattr(file_parts, "RANGE", 4)
    (tmp_path / "a.txt").write_text("some lines\nof text\n")
    (tmp_path / "b.txt").write_bytes(gzip.compress(b"more lines\n"))
    parts = open_corpus("text:*.txt", make_data(documents="line"), "train").parts()
    with pytest.raises(UserError, match=r"b\.txt: compressed \(gzip\)"):
        [list(part.chunks()) for part in parts]
