import gzip
import json

import pytest

from lm.data.dataset import open_corpus
from lm.errors import UserError


def documents(corpus):
    found = []
    for piece in corpus.chunks():
        if piece.first:
            found.append("")
        found[-1] += piece.text
    return found


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_text_file_is_a_document_or_its_lines_are(make_data, tmp_path):
    (tmp_path / "b.txt").write_bytes("zwei\r\n\r\n  drei ü\n".encode())
    (tmp_path / "a.txt").write_bytes(b"eins\n")
    assert documents(open_corpus("text:*.txt", make_data(), "train")) == [
        "eins\n",
        "zwei\r\n\r\n  drei ü\n",
    ]
    by_line = open_corpus("text:*.txt", make_data(documents="line"), "train")
    assert documents(by_line) == ["eins", "zwei", "  drei ü"]


def test_gz_files_read_as_the_plain_ones(make_data, tmp_path):
    text = "größer\n" * 300_000  # more than one chunk, cut inside characters
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode(), 1))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": text}).encode(), 1))
    plain = list(open_corpus("text:a.txt", make_data(), "train").chunks())
    assert len(plain) > 1
    assert list(open_corpus("text:a.txt.gz", make_data(), "train").chunks()) == plain
    assert list(open_corpus("jsonl:a.jsonl.gz", make_data(), "train").chunks()) == plain


def test_relative_paths_start_at_lm_data_dir(make_data, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("here")
    monkeypatch.setenv("LM_DATA_DIR", str(tmp_path / "sub"))
    assert documents(open_corpus("text:a.txt", make_data(directory=""), "train")) == ["here"]
    absolute = open_corpus(f"text:{tmp_path}/sub/a.txt", make_data(directory="/"), "train")
    assert documents(absolute) == ["here"]


def test_jsonl_documents_are_the_field_of_each_line(make_data, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"body": "one\ntwo"}, {"body": ""}, {"body": "é"}])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('\n{"body": "half \\ud83d pair"}')
    corpus = open_corpus("jsonl:a.jsonl", make_data(field="body"), "train")
    assert documents(corpus) == ["one\ntwo", "é", "half \ufffd pair"]


def test_stdlib_is_split_by_file_and_has_no_tests(make_data):
    train = open_corpus("stdlib", make_data(), "train")
    validation = open_corpus("stdlib", make_data(), "validation")
    assert not set(train._modules) & set(validation._modules)
    assert "argparse.py" in train._modules + validation._modules
    assert 0.02 < len(validation._modules) / len(train._modules) < 0.1
    assert not [name for name in train._modules if {"test", "tests"} & set(name.split("/"))]
    assert train.digest != validation.digest
    with open(json.__file__) as file:
        assert file.read() in documents(train) + documents(validation)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.9])
def test_end_of_a_single_document_is_held_out_by_characters(make_data, tmp_path, fraction):
    text = "Überall nur Text.\n" * 150_000
    (tmp_path / "a.txt").write_text(text)
    data = make_data(validation_fraction=fraction)
    border = int(len(text) * (1 - fraction))
    train, validation = (open_corpus("text:a.txt", data, s) for s in ("train", "validation"))
    assert documents(train) == [text[:border]]
    assert documents(validation) == [text[border:]]
    assert list(validation.chunks())[-1].last
    assert train.digest != validation.digest


def test_some_of_several_documents_are_held_out(make_data, tmp_path):
    """Of a sorted corpus both parts have documents from everywhere, in their order."""
    lines = [f"line {i}" for i in range(100)]
    (tmp_path / "a.txt").write_text("".join(f"{line}\n" for line in lines))
    data = make_data(documents="line", validation_fraction=0.2)
    splits = (open_corpus("text:a.txt", data, s) for s in ("train", "validation"))
    train, validation = map(documents, splits)
    assert [len(train), len(validation)] == [80, 20]
    for part in (train, validation):
        assert part == [line for line in lines if line in part]
    assert sorted(train + validation, key=lines.index) == lines
    assert all(set(validation) & set(lines[i : i + 50]) for i in (0, 50))
    digest = open_corpus("text:a.txt", data, "validation").digest
    data.validation_seed = 1
    other = open_corpus("text:a.txt", data, "validation")
    assert set(documents(other)) != set(validation)
    assert other.digest != digest


def test_nothing_is_held_out_beside_a_validation_source(make_data, tmp_path):
    (tmp_path / "a.txt").write_text("all of it")
    data = make_data(validation_fraction=0.5, validation_source="text:a.txt")
    for split in ("train", "validation"):
        assert documents(open_corpus("text:a.txt", data, split)) == ["all of it"]


def test_digest_matches_the_content(make_data, tmp_path):
    path = tmp_path / "a.txt"

    def digest(**changes):
        return open_corpus("text:a.txt", make_data(**changes), "train").digest

    path.write_text("one")
    first = digest()
    assert digest() == first
    assert digest(documents="line") != first
    path.write_text("two")
    assert digest() != first


@pytest.mark.parametrize(
    ("content", "spec", "words"),
    [
        (None, "text:a.txt", ["a.txt", "LM_DATA_DIR", "--config.data.directory"]),
        (None, "jsonl:*.jsonl", ["*.jsonl", "LM_DATA_DIR"]),
        (None, "text:", ["unknown data source 'text:'", "text:PATH"]),
        (b"", "text:a", ["text:a contains no text"]),
        (b"\n \n", "jsonl:a", ["jsonl:a contains no text"]),
        (b"ab\xff", "text:a", ["/a: not UTF-8 at byte 2"]),
        (b"x" * 2**20 + b"ab\xe2\x82", "text:a", [f"not UTF-8 at byte {2**20 + 2}"]),
        (b"\xe2\x82" * 2**20, "text:a", ["not UTF-8 at byte 0"]),
        (b"x" * (2**20 - 1) + b"\xc3(", "text:a", [f"not UTF-8 at byte {2**20 - 1}"]),
        (b'{"text": "x"}\n{', "jsonl:a", ["/a:2: not valid JSON"]),
        (b"[1]\n", "jsonl:a", ["/a:1: not a JSON object but list"]),
        (
            b'\n{"b": 1, "a": 2}',
            "jsonl:a",
            ["/a:2: no field 'text' (available: a, b)", "data.field"],
        ),
        (b'{"text": 3}', "jsonl:a", ["/a:1: field 'text' is of type int"]),
        (b"no gzip", "text:a.gz", ["/a.gz: damaged gzip"]),
        (gzip.compress(b"x" * 999, mtime=0)[:-9], "text:a.gz", ["/a.gz: damaged gzip"]),
        (None, "csv:a", ["csv:a", "stdlib, text:PATH, jsonl:PATH, tfds:NAME"]),
        (None, "stdlib:x", ["stdlib:x"]),
    ],
)
def test_source_errors_are_reported(make_data, tmp_path, content, spec, words):
    if content is not None:
        (tmp_path / spec.partition(":")[2]).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(open_corpus(spec, make_data(), "train").chunks())
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_split_that_is_not_there_is_reported(make_data, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="validation_fraction"):
        open_corpus("text:a.txt", make_data(), "validation")
    with pytest.raises(UserError, match="leaves a split empty: it has 1 characters"):
        list(open_corpus("text:a.txt", make_data(validation_fraction=0.1), "train").chunks())
