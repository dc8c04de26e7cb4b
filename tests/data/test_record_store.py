import json

import numpy as np
import pytest

from lm.data.record_store import build_record_store
from lm.data.records import open_records
from lm.data.tokenizers.basic import ByteTokenizer, CharTokenizer, WordTokenizer
from lm.errors import UserError


@pytest.fixture
def pairs(make_data, tmp_path):
    """Three pairs of lines, and what they are."""
    sources, targets = ["one two", "drei 漢", "x"], ["eins", "three", "ypsilon  "]
    (tmp_path / "a").write_text("\n".join(sources))
    (tmp_path / "b").write_text("\n".join(targets))
    records = open_records("parallel:a|b", make_data())
    return records, sources, targets


def test_store_holds_records_and_their_tokens(pairs, tmp_path):
    records, sources, targets = pairs
    store = build_record_store(records, ByteTokenizer(), tmp_path)
    assert len(store) == 3
    for record, source, target in zip(store, sources, targets, strict=True):
        assert record.raw == {"source": source, "target": target}
        assert bytes(record.tokens["source"].tolist()) == source.encode()
        assert bytes(record.tokens["target"].tolist()) == target.encode()
        assert record.tokens["source"].dtype == np.int32
        assert record.starts is None
    sizes = {"source": [7, 8, 1], "target": [4, 5, 9]}
    assert {role: store.lengths(role).tolist() for role in sizes} == sizes
    manifest = store.manifest
    assert (manifest.n_rows, manifest.n_skipped, manifest.source) == (3, 0, "parallel:a|b")
    assert manifest.n_bytes == manifest.n_tokens == {"source": 16, "target": 18}
    assert (manifest.source_digest, manifest.tokenizer_digest) == (
        records.digest,
        ByteTokenizer().digest,
    )
    for index in (-1, 3):
        with pytest.raises(IndexError):
            store[index]


def test_finished_store_is_opened_again_and_a_damaged_one_rebuilt(pairs, tmp_path, monkeypatch):
    records, sources, _ = pairs
    first = build_record_store(records, ByteTokenizer(), tmp_path)
    (first.directory / "source.bin").write_bytes(b"")
    again = build_record_store(records, ByteTokenizer(), tmp_path)
    assert again.directory == first.directory
    assert [record.raw["source"] for record in again] == sources
    monkeypatch.setattr(type(records), "read", None)
    assert len(build_record_store(records, ByteTokenizer(), tmp_path)) == 3
    with pytest.raises(TypeError):
        build_record_store(records, WordTokenizer.fit(["x"]), tmp_path)


def test_skipped_rows_are_counted_and_reported_at_every_start(make_data, tmp_path, capsys):
    (tmp_path / "a").write_text("text\nx\n \ny\tz\nw\n")
    records = open_records("tsv:a", make_data(bad_rows="skip"))
    for _ in range(2):
        store = build_record_store(records, ByteTokenizer(), tmp_path)
        assert (len(store), store.manifest.n_skipped) == (2, 2)
        said = capsys.readouterr().err
        assert said == f"tsv:a: skipped 2 of 4 rows; first: {tmp_path}/a:3: 'text' is empty\n"


def test_text_that_cannot_be_encoded_is_named(pairs, tmp_path):
    records, sources, _ = pairs
    with pytest.raises(UserError, match=r"/a:2: character '漢'"):
        build_record_store(records, CharTokenizer.fit([*sources[:1], "eins dr"]), tmp_path)


def test_tokens_of_a_context_know_their_characters(make_data, tmp_path):
    question = {"id": "1", "question": "Who, Ada?", "answers": [{"text": "Ada", "answer_start": 8}]}
    paragraph = {"context": "It was  Ada, née Ähm.", "qas": [question, question | {"id": "2"}]}
    (tmp_path / "a").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    records = open_records("squad:a", make_data())
    store = build_record_store(records, WordTokenizer.fit(["It was Ada , née . Who,"]), tmp_path)
    for index, name in enumerate(["1", "2"]):
        record = store[index]
        assert record.raw["id"] == name
        assert record.raw["answers"] == [{"text": "Ada", "start": 8}]
        context = record.raw["context"]
        spans = [context[s:e] for s, e in zip(record.starts, record.ends, strict=True)]
        assert spans == ["It", "was", "Ada", ",", "née", "Ähm", "."]
        assert len(record.tokens["context"]) == len(spans)
        assert record.starts[2] == 8
        assert len(record.tokens["question"]) == 2


def test_vocabulary_without_a_token_for_a_role_is_reported(make_data, tmp_path):
    class Nothing(ByteTokenizer):
        def encode(self, text):
            return np.zeros(0, np.int32)

    (tmp_path / "a").write_text("text\nx\n")
    with pytest.raises(UserError, match="no token for any text"):
        build_record_store(open_records("tsv:a", make_data()), Nothing(), tmp_path)
