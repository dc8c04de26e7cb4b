"""Parquet and Arrow: documents and records equal those of JSON lines, in any container."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.data.dataset import open_corpus
from lm.data.records import open_records
from lm.data.row_documents import MISSING, field_value
from lm.data.text import columnar
from lm.errors import UserError


def _chunks(spec, data):
    return list(open_corpus(spec, data, "train").chunks())


def _texts(spec, data):
    return [chunk.text for chunk in _chunks(spec, data)]


def _write(folder, rows, group=2):
    """Write rows as JSON lines, Parquet, and both formats of Arrow; return the sources."""
    table = pa.Table.from_pylist(rows)
    (folder / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(table, folder / "f.parquet", row_group_size=group)
    with pa.ipc.new_stream(folder / "s.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=group)
    with pa.ipc.new_file(folder / "f.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=group)
    return ["jsonl:f.jsonl", "parquet:f.parquet", "arrow:s.arrow", "arrow:f.arrow"]


_rows = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
            | st.just("LONG"),
            "meta": st.fixed_dictionaries({"text": st.text("ab\n\0é😀", max_size=9)}),
            "n": st.integers(0, 3),
        }
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_rows, st.integers(1, 3), st.sampled_from(["text", "meta.text"]))
def test_documents_are_the_same_in_any_container(make_data, tmp_path, rows, group, field):
    rows = [{**row, "text": row["text"].replace("LONG", "x\ny " * 400_000)} for row in rows]
    data = make_data(field=field)
    wanted, *others = (
        list(open_source(source, data).chunks()) for source in _write(tmp_path, rows, group)
    )
    assert all(chunks == wanted for chunks in others)


def open_source(spec, data):
    from lm.config.registries import SOURCES

    name, _, argument = spec.partition(":")
    return SOURCES[name](argument, data, "train")


def test_records_are_the_same_in_any_container(make_data, tmp_path):
    rows = [
        {"translation": {"en": f"one {i}", "de": f"eins {i}"}, "label": i % 2, "words": ["a", "b"]}
        for i in range(5)
    ]
    for columns in ("source=translation.en,target=translation.de,label=label", "", "words=words"):
        data = make_data(columns=columns)
        wanted, *others = (
            [record for record, _ in open_records(source, data)]
            for source in _write(tmp_path, rows)
        )
        assert wanted[0]
        assert all(records == wanted for records in others)


def test_row_groups_of_a_large_file_are_parts(make_data, tmp_path, monkeypatch):
    _write(tmp_path, [{"text": f"text {i}", "other": 1} for i in range(11)])
    monkeypatch.setattr(columnar, "RANGE", 250)
    corpus = open_corpus("parquet:f.parquet", make_data(), "train")
    parts = corpus.parts()
    assert 2 < len(parts) < 11
    assert [chunk for part in parts for chunk in part.chunks()] == list(corpus.chunks())
    data = make_data(field="other")
    last = open_source("parquet:f.parquet", data).parts()[-1]
    with pytest.raises(UserError, match=r"row 11: |row 9: |row 7: ") as error:
        list(last.chunks())
    assert f"row {2 * last.groups.start + 1}: " in str(error.value)


def test_literal_dot_comes_before_a_nested_name():
    values = {"a.b": 1, "a": {"b": 2, "c.d": 3, "e": None}}
    assert [field_value(values, f) for f in ("a.b", "a.c.d", "a.e")] == [1, 3, None]
    assert field_value(values, "a.x") is field_value(values, "x.y") is MISSING


def test_nested_fields_of_json_lines_that_are_missing_are_named(make_data, tmp_path):
    (tmp_path / "f").write_text('{"meta": {"text": "x"}}\n{"meta": {"other": 1}}\n{"meta": 3}\n')
    data = make_data(field="meta.text", bad_rows="skip")
    assert _texts("jsonl:f", data) == ["x"]
    with pytest.raises(UserError, match=r"f:2: no field 'meta\.text' \(available: meta\)"):
        _chunks("jsonl:f", make_data(field="meta.text"))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("values", "place", "words"),
    [
        (pa.array(["good", None]), 2, "of type NoneType"),
        (pa.array([3, 4]), 1, "of type int"),
        (pa.array([b"good", b"x"]), 1, "of type bytes"),
        (pa.array(["good", "x"]), 1, "no field 'text' (available: other)"),
        (
            pa.Array.from_buffers(
                pa.string(),
                2,
                [None, pa.array([0, 4, 6], pa.int32()).buffers()[1], pa.py_buffer(b"goodx\xff")],
            ),
            2,
            "not UTF-8 at byte 1",
        ),
    ],
)
def test_bad_rows_are_named_or_skipped(make_data, tmp_path, capsys, kind, values, place, words):
    name = "other" if "no field" in words else "text"
    table = pa.table({name: values})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "f")
    else:
        with pa.ipc.new_stream(tmp_path / "f", table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UserError) as error:
        _chunks(f"{kind}:f", make_data())
    assert f"/f: row {place}: " in str(error.value)
    assert words in str(error.value)
    data = make_data(bad_rows="skip")
    if place == 2:
        assert _texts(f"{kind}:f", data) == ["good"]
        assert "1 bad rows skipped, the first" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match="contains no text"):
            _chunks(f"{kind}:f", data)


@pytest.mark.parametrize("source", ["parquet:f.parquet", "arrow:s.arrow", "arrow:f.arrow"])
@pytest.mark.parametrize("damage", ["empty", "head", "tail", "middle", "text"])
def test_damaged_tables_are_one_line_errors(make_data, tmp_path, source, damage):
    _write(tmp_path, [{"text": f"text {i} " * 50} for i in range(50)], group=50)
    path = tmp_path / source.partition(":")[2]
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(
        {
            "empty": b"",
            "head": content[:half],
            "tail": content[half:],
            "middle": content[:half] + content[half + 64 :],
            "text": b"plain text, and nothing else\n" * 9,
        }[damage]
    )
    with pytest.raises(UserError) as error:
        _chunks(source, make_data())
    assert f"{path}: " in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_that_datasets_saved(make_data, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(7)]
    train = datasets.Dataset.from_list(rows, features=features)
    train.save_to_disk(tmp_path / "one", num_shards=3)
    held_out = train.filter(lambda row: row["label"] == 1)
    both = datasets.DatasetDict(train=train, validation=held_out)
    both.save_to_disk(tmp_path / "both")
    assert _texts("arrow:one", make_data()) == [row["text"] for row in rows]
    train_split = open_corpus("arrow:both", make_data(), "train")
    assert [chunk.text for chunk in train_split.chunks()] == [row["text"] for row in rows]
    validation = open_corpus("arrow:both", make_data(), "validation")
    assert [chunk.text for chunk in validation.chunks()] == ["text 1", "text 3", "text 5"]
    train.to_parquet(tmp_path / "f.parquet")
    for source in ("arrow:one", "parquet:f.parquet"):
        records = [record for record, _ in open_records(source, make_data(labels="bad,good"))]
        assert records[:2] == [
            {"text": "text 0", "label": "bad"},
            {"text": "text 1", "label": "good"},
        ]
    with pytest.raises(UserError, match=r"no split 'x' \(available: train, validation\)"):
        open_corpus("arrow:both", make_data(split="x"), "train")
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00003\.arrow: missing"):
        open_corpus("arrow:one", make_data(), "train")
    (tmp_path / "one" / "state.json").unlink()
    with pytest.raises(UserError, match="not a folder written by datasets"):
        open_corpus("arrow:one", make_data(), "train")


def test_tags_and_answers_as_datasets_has_them(make_data, tmp_path):
    datasets = pytest.importorskip("datasets")
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-PER"]))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner": tags})
    rows = [{"tokens": ["Ann", "came"], "ner": [1, 0]}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "ner.parquet")
    data = make_data(columns="words=tokens,tags=ner", labels="O,B-PER")
    ((record, where),) = open_records("parquet:ner.parquet", data)
    assert record == {"words": "Ann came", "tags": "B-PER O"}
    assert str(where).endswith("ner.parquet: row 1")
    answers = {"text": ["b"], "answer_start": [2]}
    rows = [{"id": "1", "question": "?", "context": "A b.", "answers": answers}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "qa.parquet")
    ((record, _),) = open_records("parquet:qa.parquet", make_data())
    assert record["answers"] == [{"text": "b", "start": 2}]
    assert not record["is_impossible"]


def test_compressed_tables_are_rejected(make_data, tmp_path):
    (tmp_path / "f.parquet.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="decompress it"):
        _chunks("parquet:f.parquet.gz", make_data())


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_field_of_a_null_is_a_null(kind, make_data, tmp_path):
    meta = pa.array([{"text": "x"}, None, {"text": "y"}], pa.struct([("text", pa.string())]))
    table = pa.table({"meta": meta})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "f.parquet")
    else:
        with pa.ipc.new_stream(tmp_path / "f.arrow", table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UserError, match=r"row 2: field 'meta\.text' is of type NoneType"):
        _chunks(f"{kind}:f.{kind}", make_data(field="meta.text"))
    assert _texts(f"{kind}:f.{kind}", make_data(field="meta.text", bad_rows="skip")) == ["x", "y"]


def test_empty_compressed_file_is_truncated(make_data, tmp_path):
    for content in (b"", b"abcd"):
        (tmp_path / "f.arrow").write_bytes(content)
        with pytest.raises(UserError, match=r"f\.arrow: damaged arrow file \(it is truncated"):
            _chunks("arrow:f.arrow", make_data())
