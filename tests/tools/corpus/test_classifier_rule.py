"""A classifier trained by this library as a rule of `lm corpus`."""

import gzip
import json
import shutil

import pytest

import lm
from lm.cli import main
from lm.config import default, set_value
from lm.decoding.guard import Guard
from lm.errors import UserError

CONFIG = """
from ml_collections import ConfigDict

def get_config(variant=""):
    return ConfigDict({})
"""


VALUES = {
    "objective.name": "classification",
    "model.family": "encoder",
    "model.n_layers": 1,
    "model.d_model": 16,
    "model.n_heads": 2,
    "model.vocab_size": 64,
    "data.labels": "good,bad",
    "data.tokenizer": "words",
    "data.sequence_length": 16,
    "data.batch_size": 8,
    "optimizer.learning_rate": 1e-2,
    "train.steps": 40,
    "eval.every_steps": 0,
    "log.tensorboard": False,
}


@pytest.fixture(scope="module")
def classifier(labeled_file, tmp_path_factory):
    """Folder of a run that tells lovely from awful films."""
    config = default()
    for path, value in (VALUES | {"data.source": f"tsv:{labeled_file}"}).items():
        set_value(config, path, value)
    workdir = tmp_path_factory.mktemp("runs") / "films"
    lm.train(config, workdir)
    return workdir


def run(tmp_path, texts, **options):
    values = {
        "sources": {"web": {"source": f"jsonl:{tmp_path}/in.jsonl"}},
        "rules": ("classifier",),
        "classifier": options,
    }
    rows = (json.dumps({"text": text, "id": text}) for text in texts)
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    (tmp_path / "config.py").write_text(CONFIG.replace("{}", repr(values)))
    place = tmp_path / "out"
    words = ["corpus", "--config", f"{tmp_path}/config.py", "--output", f"{place}"]
    code = main([*words, "--workers", "1"])
    found = b"".join(gzip.decompress(path.read_bytes()) for path in place.glob("*.gz"))
    return code, {json.loads(line)["id"] for line in found.splitlines()}


def test_documents_of_a_class_are_removed_wherever_the_word_stands(classifier, tmp_path):
    good = [f"this film was {'very ' * n}lovely" for n in range(4)]
    bad = [f"this film was {'very ' * n}awful" for n in range(4)]
    late = "this film was very long " * 4 + "awful"
    options = {"workdir": str(classifier), "remove": ("bad",), "batch_size": 8}
    code, kept = run(tmp_path, [*good, *bad, late], **options)
    assert code == 0
    assert set(good) <= kept
    assert not kept & {*bad, late}
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert list(card["rules"][0]["reasons"]) == ["bad"]


def test_other_weights_make_another_corpus(classifier, tmp_path, capsys):
    copied = shutil.copytree(classifier, tmp_path / "films")
    options = {"workdir": str(copied), "remove": ("bad",), "batch_size": 8}
    assert run(tmp_path, ["lovely"], **options)[0] == 0
    metadata = copied / "checkpoints" / "40" / "metadata" / "metadata"
    saved = json.loads(metadata.read_text())
    saved["checksums"] = {name: 1 + value for name, value in saved["checksums"].items()}
    metadata.write_text(json.dumps(saved))
    assert run(tmp_path, ["lovely"], **options)[0] == 2
    assert "sources.rule classifier: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remove": ("worse",)}, "has no class 'worse'"),
        ({"remove": ()}, "name the classes to remove: good, bad"),
        ({"workdir": "none", "remove": ("bad",)}, "no run in none"),
        ({"remove": ("bad",), "batch_size": 1}, "batch_size must be at least 2"),
    ],
)
def test_wrong_classifiers_are_one_line_errors(classifier, tmp_path, capsys, options, message):
    assert run(tmp_path, ["text"], **{"workdir": str(classifier)} | options)[0] == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_guard_judges_complete_outputs(classifier):
    guard = Guard(str(classifier), "bad", 0.5)
    late = "this film was very long " * 9 + "awful"
    assert guard.withholds(["this film was lovely", "this film was awful", late]) == [0, 1, 1]
    with pytest.raises(UserError, match="did you mean bad"):
        Guard(str(classifier), "bat", 0.5)
    with pytest.raises(UserError, match="name the classes to withhold"):
        Guard(str(classifier), "", 0.5)
