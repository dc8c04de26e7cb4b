"""`lm train` and `lm eval --task` of tiny models on tiny tasks."""

import itertools
import json
import random
import re

import jax
import pytest

from lm.cli import main

CONFIG = """
from lm.config import default

def get_config():
    config = default()
    config.data.directory = {folder!r}
    config.data.tokenizer = "words"
    config.data.sequence_length, config.data.batch_size = 12, 32
    config.model.n_layers, config.model.d_model, config.model.n_heads = 1, 32, 2
    config.model.init_std = 0.1
    config.optimizer.learning_rate, config.optimizer.weight_decay = 5e-3, 0.0
    config.schedule.warmup_steps = 10
    config.train.steps_per_dispatch = 20
    config.log.tensorboard = False
    for path, value in {values!r}.items():
        section, key = path.split(".")
        config[section][key] = value
    return config
"""


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: first)


@pytest.fixture
def lm(tmp_path, capsys):
    """Run `lm VERB` on the test's workdir; gives what is printed, or the error's one line."""

    def lm(verb, *words):
        code = main([verb, "--workdir", str(tmp_path / "run"), *map(str, words)])
        printed = capsys.readouterr()
        lm.error = printed.err
        if code == 0:
            return printed.out
        assert code == 2
        assert "Traceback" not in printed.err
        return printed.err.splitlines()[-1].removeprefix("error: ")

    return lm


@pytest.fixture
def shown_progress(monkeypatch, lm):
    """Show progress without waiting for a minute; gives what the last verb showed."""
    monkeypatch.setattr("lm.progress._SECONDS_A_LINE", 0.0)
    return lambda: lm.error


@pytest.fixture
def train(tmp_path, lm):
    """Train with some keys of the configuration changed."""

    def train(values):
        file = tmp_path / "config.py"
        file.write_text(CONFIG.format(folder=str(tmp_path), values=values))
        return lm("train", "--config", file)

    return train


@pytest.fixture
def write(tmp_path):
    def write(name, lines):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))

    return write


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def sentences(n, seed):
    """Labels and texts: "yes" if good is among the words, "no" if bad is."""
    chance = random.Random(seed)
    for i in range(n):
        words = chance.choices("abcdefgh", k=chance.randrange(2, 8))
        words.insert(chance.randrange(len(words) + 1), "good" if i % 2 else "bad")
        yield f"{'yes' if i % 2 else 'no'}\t{' '.join(words)}"


CLASSIFY = {
    "objective.name": "classification",
    "model.family": "encoder",
    "data.source": "tsv:train.tsv",
    "data.validation_fraction": 0.2,
    "data.columns": "label=0,text=1",
    "data.header": False,
    "data.labels": "no,yes",
}


def test_classifier_learns_and_is_scored(write, train, lm, tmp_path, shown_progress):
    write("train.tsv", sentences(160, seed=0))
    write("test.tsv", sentences(41, seed=1))
    task = {"data.test_source": "tsv:test.tsv", "train.steps": 60}
    assert "validation accuracy: 1" in train(CLASSIFY | task)

    report = json.loads(lm("eval", "--task", "--split", "test", "--json"))
    assert report == {"step": 60, "split": "test", "n": 41, "accuracy": 100.0}
    assert re.search(r"predicting: [1-9]\d* of ", shown_progress())
    folder = tmp_path / "run" / "eval" / "test-60"
    assert json.loads((folder / "report.json").read_text()) == report
    found = predictions(folder)
    assert len(found) == 41
    assert all(row["prediction"] == row["label"] for row in found)
    texts = [f"{row['label']}\t{row['text']}" for row in found]
    assert texts == list(sentences(41, seed=1))

    words = ["--output", tmp_path / "here", "--config.eval.metrics=matthews, f1"]
    assert (
        lm("eval", "--task", *words)
        == "step = 60\nsplit = validation\nn = 32\nmatthews = 1\nf1 = 100\n"
    )
    assert len(predictions(tmp_path / "here")) == 32

    error = "--output needs --task, whose report it is for"
    assert lm("eval", *words[:2]) == error
    error = "--config.eval.metrics=acuracy: unknown metric 'acuracy'; did you mean accuracy?"
    assert lm("eval", "--task", "--config.eval.metrics=acuracy").startswith(error)
    assert lm("eval", "--split", "test", "--config.data.test_source=tsv:none").startswith("no file")


def test_regression_is_scored_by_its_correlations(write, train, lm, tmp_path, monkeypatch):
    chance = random.Random(0)
    rows = [chance.choices("ab", k=8) for _ in range(200)]
    write("train.tsv", (f"{row.count('a')}\t{' '.join(row)}" for row in rows))
    train(CLASSIFY | {"data.labels": "", "train.steps": 100})
    report = json.loads(lm("eval", "--task", "--json"))
    assert report.keys() == {"step", "split", "n", "pearson", "spearman"}
    assert report["pearson"] > 0.95
    assert report["spearman"] > 0.9
    # A folder that cannot be written is said before anything is predicted.
    monkeypatch.setattr("lm.evaluation.task.TASKS", {})
    for output in (tmp_path / "train.tsv", tmp_path / "train.tsv" / "a", "/proc/self/eval"):
        error = lm("eval", "--task", "--output", output)
        assert error.startswith(f"cannot write the report to {output} (")


def backwards():
    """Every row of one to three of six letters, and the same backwards."""
    rows = [row for n in (1, 2, 3) for row in itertools.product("abcdef", repeat=n)]
    random.Random(0).shuffle(rows)
    return [f"{' '.join(row)}\t{' '.join(row[::-1])}" for row in rows]


@pytest.mark.parametrize("family", ["encoder_decoder", "lstm_encoder_decoder"])
def test_model_learns_to_reverse(write, train, lm, tmp_path, family, shown_progress):
    lines = backwards()
    write("train.tsv", lines[40:])
    write("test.tsv", lines[:40])
    train(
        {
            "objective.name": "seq2seq",
            "model.family": family,
            "data.source": "tsv:train.tsv",
            "data.test_source": "tsv:test.tsv",
            "data.columns": "source=0,target=1",
            "data.header": False,
            "train.steps": 200,
            "decode.max_length": 6,
        }
    )
    report = json.loads(lm("eval", "--task", "--split", "test", "--json"))
    assert "decoding: 32 of 40 (80 %)" in shown_progress()
    assert report["n"] == 40
    assert report["exact_match"] >= 90
    assert report["bleu_signature"].startswith("nrefs:1")
    found = predictions(tmp_path / "run" / "eval" / "test-200")
    right = sum(row["prediction"] == row["target"] for row in found)
    assert report["exact_match"] == 100 * right / 40
    assert [f"{row['source']}\t{row['target']}" for row in found] == lines[:40]

    error = lm("eval", "--task")
    assert error == "the configuration has no validation data; set --config.data.validation_source"
    write("test.tsv", ["a b"])
    (tmp_path / "test.tsv").write_text("a b\n")
    error = lm("eval", "--task", "--split", "test", "--config.data.columns=source=0")
    assert "a record has no target (it has source)" in error


def squad(n, seed, impossible):
    """Contexts of small letters and one word in capitals, which is what is asked for."""
    chance = random.Random(seed)
    paragraphs = []
    for i in range(n):
        words = chance.choices("abcdefgh", k=chance.randrange(3, 20))
        at = chance.randrange(len(words))
        lacks = impossible and i % 2 == 0
        word = chance.choice(["NORTH", "SOUTH", "EAST", "WEST"])
        words[at : at + 1] = [] if lacks else [word]
        answer = {"text": word, "answer_start": sum(len(word) + 1 for word in words[:at])}
        qa = {"id": str(i), "question": "Where?", "answers": [] if lacks else [answer]}
        paragraphs.append({"context": " ".join(words), "qas": [qa | {"is_impossible": lacks}]})
    return [json.dumps({"data": [{"paragraphs": paragraphs}]})]


@pytest.mark.parametrize("impossible", [False, True])
def test_encoder_learns_to_find_answers(write, train, lm, tmp_path, impossible):
    write("train.json", squad(160, 0, impossible))
    write("more.json", squad(11, 1, impossible))
    write("test.json", squad(20, 2, impossible))
    train(
        {
            "objective.name": "span_qa",
            "model.family": "encoder",
            "model.token_types": 2,
            "data.source": "squad:train.json",
            "data.test_source": "squad:more.json,squad:test.json",
            "data.sequence_length": 12,
            "data.doc_stride": 4,
            "train.steps": 100,
        }
    )
    report = json.loads(lm("eval", "--task", "--split", "test", "--json"))
    assert report["n"] == 31
    assert report["squad_exact_match"] >= 95
    assert report["squad_f1"] >= 95
    found = predictions(tmp_path / "run" / "eval" / "test-100")
    golds = [row["answers"][0]["text"] if row["answers"] else "" for row in found]
    assert golds.count("") == (16 if impossible else 0)
    right = sum(row["prediction"] == gold for row, gold in zip(found, golds, strict=True))
    assert report["squad_exact_match"] == pytest.approx(100 * right / 31)


def test_run_without_a_task_is_reported(write, train, lm):
    write("text.txt", ["a b c d"] * 30)
    train(
        {
            "data.source": "text:text.txt",
            "data.validation_source": "text:text.txt",
            "data.batch_size": 4,
            "train.steps": 1,
        }
    )
    error = lm("eval", "--task")
    assert error == "--config.objective.name=causal has no task: run lm eval without --task"
    error = lm("eval", "--split", "test")
    assert error == "the configuration has no test data; set --config.data.test_source"
