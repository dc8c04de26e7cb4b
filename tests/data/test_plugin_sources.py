"""Plug-in formats and tokenizers, outside the repository: documents and records."""

from __future__ import annotations

import json

import numpy as np
import pytest
from plugins import forget_plugins

import lm.data.store
from lm import config as configs
from lm.cli import main
from lm.data.dataset import has_validation, open_dataset, open_tokenizer
from lm.data.splits import open_split
from lm.errors import UserError

PLUGIN = """
import json
from functools import cached_property

import numpy as np

from lm.config.registries import SOURCES, TOKENIZERS
from lm.data.file_digests import hash_files
from lm.data.files import find_files
from lm.data.sources import DocumentSource, RecordSource, Row, cut_document
from lm.data.tokenizer import Tokenizer


@SOURCES.register("columnar")
class Columnar(DocumentSource, RecordSource):
    forms = ("columnar:PATH",)

    def __init__(self, argument, data, split):
        self.name, self.column = f"columnar:{argument}", data.field
        self.files = find_files(argument, data)

    @cached_property
    def digest(self):
        return hash_files(self.files, "columnar", self.column)

    def tables(self):
        for path in self.files:
            yield path, json.loads(path.read_text())

    def chunks(self):
        for _, table in self.tables():
            for text in table[self.column]:
                yield from cut_document([text])

    def rows(self):
        for path, table in self.tables():
            for number, values in enumerate(zip(*table.values()), start=1):
                yield Row(f"{path}:row {number}", dict(zip(table, values)))


@SOURCES.register("columnar_splits")
class ColumnarSplits(Columnar):
    forms = ("columnar_splits:FOLDER",)

    def __init__(self, argument, data, split):
        super().__init__(f"{argument}/{split}.columns", data, split)

    @classmethod
    def has_validation_split(cls, argument, data):
        return True


@TOKENIZERS.register("backwards")
class Backwards(Tokenizer):
    kind = "backwards"
    forms = ("backwards",)
    vocab_size = 256

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8)[::-1].astype(np.int32)

    def decode(self, ids):
        return bytes(list(ids)[::-1]).decode(errors="replace")

    def files(self):
        return {}

    @classmethod
    def from_files(cls, files):
        return cls()
"""

CONFIG = """
from lm.config import default


def get_config():
    config = default()
    config.model.n_layers, config.model.n_heads, config.model.d_model = 1, 2, 16
    config.data.source, config.data.validation_fraction = "columnar:a.columns", 0.25
    config.data.sequence_length, config.data.batch_size = 16, 8
    config.train.steps, config.log.tensorboard = 2, False
    return config
"""


@pytest.fixture(autouse=True)
def _fresh_process():
    forget_plugins()
    yield
    forget_plugins()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A configuration that imports the plug-in, and files in its format."""
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    (tmp_path / "config.py").write_text("import my_plugin\n" + CONFIG)
    (tmp_path / "splits").mkdir()
    for name, n in (("a", 40), ("splits/train", 30), ("splits/validation", 10)):
        table = {
            "text": [f"{name} text {i}, some more of it" for i in range(n)],
            "label": ["good" if i % 2 else "bad" for i in range(n)],
        }
        (tmp_path / f"{name}.columns").write_text(json.dumps(table))
    monkeypatch.setenv("LM_DATA_DIR", str(tmp_path))
    return tmp_path


def load(folder, **changes):
    words = {f"data.{name}": str(value) for name, value in changes.items()}
    return configs.load_config(f"{folder}/config.py", words).data


@pytest.mark.usefixtures("one_device")
def test_run_trains_on_documents_and_resumes_unless_they_changed(folder, tmp_path, capsys):
    words = ["--config", f"{folder}/config.py", "--workdir", f"{tmp_path}/run"]
    assert main(["train", *words]) == 0
    assert main(["eval", "--workdir", f"{tmp_path}/run"]) == 0
    fingerprint = json.loads((tmp_path / "run" / "run.json").read_text())["fingerprint"]
    assert set(fingerprint) == {
        "tokenizer",
        "train columnar:a.columns (train)",
        "validation columnar:a.columns (validation)",
    }
    (folder / "a.columns").write_text(json.dumps({"text": ["changed"] * 30}))
    assert main(["train", *words]) == 2
    assert "changed since the run" in capsys.readouterr().err


@pytest.mark.usefixtures("one_device")
def test_run_trains_on_records(folder, tmp_path):
    words = ["--config", f"{folder}/config.py", "--workdir", f"{tmp_path}/run"]
    task = {"objective.name": "classification", "data.labels": "good,bad"}
    words += [f"--config.{path}={value}" for path, value in task.items()]
    assert main(["train", *words]) == 0
    assert main(["eval", "--workdir", f"{tmp_path}/run", "--task"]) == 0


def test_part_is_held_out_of_documents_and_of_records(folder):
    data = load(folder, labels="good,bad")
    documents = open_dataset(data)
    sizes = [s.manifest.n_documents for s in (*documents.train, *documents.validation)]
    assert sizes == [30, 10]
    records = open_dataset(data, columns=("text", "label"))
    assert [len(store) for store in (*records.train, *records.validation)] == [30, 10]
    texts = [
        record.raw["text"] for store in (*records.train, *records.validation) for record in store
    ]
    assert sorted(texts) == sorted(f"a text {i}, some more of it" for i in range(40))


def test_validation_split_of_its_own_is_used(folder):
    data = load(folder, source="columnar_splits:splits", labels="good,bad")
    assert has_validation("columnar_splits:splits", data)
    documents = open_dataset(data)
    sizes = [s.manifest.n_documents for s in (*documents.train, *documents.validation)]
    assert sizes == [30, 10]
    records = open_dataset(data, columns=("text", "label"))
    assert [len(store) for store in (*records.train, *records.validation)] == [30, 10]
    (again,) = open_split(data, "validation", records.tokenizer, columns=("text", "label"))
    assert again[0].raw == {"text": "splits/validation text 0, some more of it", "label": "bad"}


def test_bad_row_is_an_error_at_its_place(folder):
    table = {"text": ["good row", " "], "label": ["good", "bad"]}
    (folder / "a.columns").write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"a.columns:row 2: 'text' is empty"):
        open_dataset(load(folder, labels="good,bad"), columns=("text", "label"))


def test_messages_name_the_sources_of_plugins(folder):
    with pytest.raises(UserError, match=r"known: stdlib, .*columnar:PATH, columnar_splits:FOLDER"):
        load(folder, source="columner:a")
    with pytest.raises(UserError, match="backwards"):
        load(folder, tokenizer="backward")


@pytest.mark.parametrize("where", ["in a module", "in the configuration file"])
def test_worker_processes_import_the_tokenizer(folder, monkeypatch, where):
    monkeypatch.setattr(lm.data.store, "_SMALL", 0)  # worker processes at once
    monkeypatch.setattr(lm.data.store, "CHUNK", 100)
    if where == "in the configuration file":
        (folder / "my_plugin.py").unlink()
        (folder / "config.py").write_text(PLUGIN + CONFIG)
    changes = {"tokenizer": "backwards", "validation_fraction": 0, "workers": 2}
    data = load(folder, **changes, cache_directory=folder / "cache")
    (store,) = open_dataset(data).train
    text = "".join(f"a text {i}, some more of it"[::-1] for i in range(40))
    np.testing.assert_array_equal(store.tokens, np.frombuffer(text.encode(), np.uint8))
    assert open_tokenizer(data).decode(store.tokens[:25]) == "a text 0, some more of it"
