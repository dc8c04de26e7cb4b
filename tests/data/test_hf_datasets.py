"""Hugging Face's library as a source: folders of files, saved data sets, and wrong ones."""

import json
import os
import subprocess
import sys

import pytest
from hub import served_hub

from lm.data.dataset import open_corpus
from lm.data.records import open_records
from lm.errors import UserError

datasets = pytest.importorskip("datasets")

ROWS = [{"text": f"text {i}", "meta": {"text": f"inner {i}"}, "label": i % 2} for i in range(5)]
FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "meta": {"text": datasets.Value("string")},
        "label": datasets.ClassLabel(names=["bad", "good"]),
    }
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "corpus"
    (folder / "data").mkdir(parents=True)
    train = datasets.Dataset.from_list(ROWS, features=FEATURES)
    train.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    train.select(range(2)).to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    train.save_to_disk(tmp_path / "saved")
    return folder


def texts(spec, data, split="train"):
    return [chunk.text for chunk in open_corpus(spec, data, split).chunks()]


def test_splits_of_a_folder_of_files(make_data, folder):
    assert texts("datasets:corpus", make_data()) == [row["text"] for row in ROWS]
    assert texts("datasets:corpus", make_data(), "validation") == ["text 0", "text 1"]
    inner = make_data(field="meta.text")
    assert texts("datasets:corpus", inner) == [row["meta"]["text"] for row in ROWS]
    with pytest.raises(UserError, match=r"no split 'x' \(available: train, validation\)"):
        texts("datasets:corpus", make_data(split="x"))
    with pytest.raises(UserError, match="row 1: no field 'other'"):
        texts("datasets:corpus", make_data(field="other"))


def test_digest_matches_the_files(make_data, folder):
    def digest():
        return open_corpus("datasets:corpus", make_data(), "train").digest

    first = digest()
    assert digest() == first
    changed = datasets.Dataset.from_list([*ROWS, ROWS[0]], features=FEATURES)
    changed.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    assert digest() != first


def test_records_have_the_names_of_classes(make_data, folder):
    data = make_data(columns="text=meta.text,label=label", labels="bad,good")
    wanted = [{"text": f"inner {i}", "label": ["bad", "good"][i % 2]} for i in range(5)]
    for spec in ("datasets:corpus", "datasets:saved"):
        assert [record for record, _ in open_records(spec, data)] == wanted


def test_saved_folder_is_read_as_arrow(make_data, folder):
    saved, arrow = (open_corpus(f"{k}:saved", make_data(), "train") for k in ("datasets", "arrow"))
    assert list(saved.chunks()) == list(arrow.chunks())
    assert saved.digest == arrow.digest


def test_questions_and_answers(make_data, tmp_path):
    (tmp_path / "qa").mkdir()
    answers = {"text": ["b"], "answer_start": [2]}
    row = {"id": "1", "question": "?", "context": "A b.", "answers": answers}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "qa" / "train.parquet")
    ((record, _),) = open_records("datasets:qa", make_data())
    assert record["answers"] == [{"text": "b", "start": 2}]


_CHILD = """
import json, sys
from lm.config import default
from lm.data.dataset import open_corpus
for spec in sys.argv[1:]:
    corpus = open_corpus(spec, default().data, "train")
    print(json.dumps([[chunk.text for chunk in corpus.chunks()], corpus.digest]))
"""


def test_files_and_a_data_set_of_the_hub(make_data, folder, tmp_path):
    """In a process of its own, because the library reads the address when it is imported."""
    (folder / "more.jsonl").write_text('{"text": "x"}\n' * 9)
    with served_hub("us/corpus", folder) as address:
        specs = ["datasets:us/corpus"]
        files = ["more.jsonl", "more.json*", "data/train-*.parquet"]
        specs += [
            f"{f.split('.')[-1].replace('*', 'l')}:hf://datasets/us/corpus/{f}" for f in files
        ]
        variables = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, *specs],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
        )
    assert child.returncode == 0, child.stderr
    (of_set, digest), *others = map(json.loads, child.stdout.splitlines())
    assert of_set == [row["text"] for row in ROWS]
    assert len(digest) == 64
    local = ["jsonl:corpus/more.jsonl"] * 2 + ["parquet:corpus/data/train-*.parquet"]
    for spec, (found, digest) in zip(local, others, strict=True):
        corpus = open_corpus(spec, make_data(), "train")
        assert found == [chunk.text for chunk in corpus.chunks()]
        assert digest == corpus.digest


def test_unopenable_file_is_a_one_line_error(make_data, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.jsonl").write_text(json.dumps({"text": "x"}) + "\n{")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for spec in ("empty", "code", "bad", "no/such/name", "../x"):
        with pytest.raises(UserError) as error:
            texts(f"datasets:{spec}", make_data())
        assert f"datasets:{spec}" in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
