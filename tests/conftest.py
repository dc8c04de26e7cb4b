"""Shared fixtures; every test runs on eight CPU devices and compiles into one cache."""
# ruff: noqa: E402  JAX reads its variables when it is imported

import gc
import json
import os
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache" / "xla"
# Variables, so that processes that a test starts inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# Models this small run as fast without optimization and compile in half the time.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"

import hypothesis
import jax
import numpy as np
import pytest
import soundfile
from absl import logging
from kinds import KINDS

from lm.cli import main
from lm.config import default, set_value

jax.config.update("jax_num_cpu_devices", 8)  # of this process only
logging.set_verbosity(logging.ERROR)
hypothesis.settings.register_profile("lm", deadline=None, derandomize=True)
hypothesis.settings.load_profile("lm")

MAPS = Path("/proc/self/maps")
MOST_MAPS = 30_000  # Linux allows a process 65,530 (vm.max_map_count); beyond them XLA crashes


def pytest_collection_finish():
    gc.freeze()  # modules and tests live to the end: no collection visits them


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory):
    """Use a cache separate from the user's for token stores and tokenizers."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_CACHE_DIR", str(path))
        patch.delenv("LM_DATA_DIR", raising=False)
        yield path


@pytest.fixture(scope="module", autouse=True)
def bounded_memory_maps():
    """Drop compiled programs before their memory maps reach the limit of the process."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Forty documents, one a line, about 8,000 bytes; the words repeat, so a model learns them."""
    words = ["the", "a", "small", "big", "model", "reads", "every", "token", "of", "text", "now"]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    lines = (
        " ".join(words[(i * i + 3 * j * j + i * j) % len(words)] for j in range(20 + 3 * (i % 9)))
        for i in range(40)
    )
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def labeled_file(tmp_path_factory):
    """Forty-eight rows of text and label; one word tells whether a text is good or bad."""
    fillers = ["this", "film", "was", "very", "long"]
    rows = (
        " ".join(
            [*(fillers[(i + j) % 5] for j in range(3 + i % 4)), "awful" if i % 3 else "lovely"]
        )
        + f"\t{'bad' if i % 3 else 'good'}"
        for i in range(48)
    )
    path = tmp_path_factory.mktemp("labeled") / "films.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{row}\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def parallel_files(tmp_path_factory):
    """Forty-eight numbers in two languages, line by line, as the paths of two files."""
    english = ["one", "two", "three", "four", "five"]
    german = ["eins", "zwei", "drei", "vier", "fünf"]
    folder = tmp_path_factory.mktemp("parallel")
    paths = folder / "numbers.en", folder / "numbers.de"
    for path, words in zip(paths, (english, german), strict=True):
        lines = (" ".join(words[i * k % 5] for k in range(1, 3 + i % 4)) for i in range(48))
        path.write_text("".join(f"{line}\n" for line in lines))
    return paths


@pytest.fixture(scope="session")
def spoken_file(tmp_path_factory):
    """Forty-eight recordings of one to three tones, and a word for each tone: their manifest."""
    words, folder = ["one", "two", "three", "four"], tmp_path_factory.mktemp("spoken")
    rows = []
    for i in range(48):
        tones = [(i * k) % 4 for k in range(1, 2 + i % 3)]
        time = np.arange(1600) / 16_000
        wave = [0.3 * np.sin(2 * np.pi * 300 * (1 + tone) * time) for tone in tones]
        soundfile.write(folder / f"{i}.wav", np.concatenate(wave), 16_000)
        rows.append({"audio": f"{i}.wav", "target": " ".join(words[tone] for tone in tones)})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "manifest.jsonl"


@pytest.fixture(scope="session")
def squad_file(tmp_path_factory):
    """Forty-eight questions in the format of SQuAD, each on a context of its own."""
    names, cities = ["Ann", "Bob", "Cid", "Dan", "Eve"], ["Rome", "Oslo", "Bonn", "Graz"]
    paragraphs = []
    for i in range(48):
        name, start = names[i % 5], "in the long winter " * (i % 2)
        context = f"{start}{name} came to {cities[i % 4]} and stayed there"
        answer = {"text": cities[i % 4], "answer_start": context.index(cities[i % 4])}
        question = {"id": str(i), "question": f"where did {name} stay", "answers": [answer]}
        paragraphs.append({"context": context, "qas": [question]})
    path = tmp_path_factory.mktemp("squad") / "cities.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return path


@pytest.fixture(scope="session")
def tagged_file(tmp_path_factory):
    """48 sentences of words with tags: names and cities."""
    names, cities = ["Ann", "Bob", "Cid", "Dan", "Eve"], ["Rome", "Oslo", "Bonn", "Graz"]
    path = tmp_path_factory.mktemp("conll") / "people.conll"
    rows = [(names[i % 5], cities[i % 4]) for i in range(48)]
    text = "".join(f"{name} B-PER\ncame O\nto O\n{city} B-LOC\n\n" for name, city in rows)
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory):
    """48 conversations of one or two turns: a question after a color, and the color."""
    colours = ["red", "green", "blue", "white"]
    path = tmp_path_factory.mktemp("chat") / "colours.jsonl"
    rows = []
    for i in range(48):
        answers = [colours[i % 4], colours[(i + 1) % 4]][: 1 + i % 2]
        rows.append([])
        for colour in answers:
            rows[-1] += [{"role": "user", "content": colour}]
            rows[-1] += [{"role": "assistant", "content": colour}]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """Forty-eight prompts with a chosen and a rejected completion, distinguished by their words."""
    words, path = ["one", "two", "three", "four"], tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = (
        {
            "prompt": " ".join(words[(i + j * j) % 4] for j in range(2 + i % 3)) + " is",
            "chosen": " very good" + " indeed" * (i % 2),
            "rejected": f" quite {words[i * i % 4]} bad",
        }
        for i in range(48)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def one_device(monkeypatch):
    """Let code that runs like the command line see only one of the eight devices."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: first)


@pytest.fixture(scope="module")
def one_device_in_module():
    """The same for a whole module, the runs that its tests share included: several times faster."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: first)
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, text_file):
    """Return the workdir of a byte decoder trained for two steps; tests must not change it."""
    folder = tmp_path_factory.mktemp("tiny_run")
    (folder / "config.py").write_text(TINY_RUN.format(text=text_file))
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: first)
        words = ["--config", str(folder / "config.py"), "--workdir", str(folder / "run")]
        assert main(["train", *words]) == 0
    return folder / "run"


TINY_RUN = """
from lm.config import default

def get_config():
    config = default()
    config.model.n_layers, config.model.d_model, config.model.n_heads = 1, 16, 2
    config.data.source, config.data.validation_fraction = "text:{text}", 0.1
    config.data.sequence_length, config.data.batch_size = 256, 4
    config.train.steps, config.decode.max_length = 2, 8
    config.log.tensorboard = False
    return config
"""


@pytest.fixture
def make_kind(
    text_file,
    labeled_file,
    parallel_files,
    spoken_file,
    squad_file,
    tagged_file,
    chat_file,
    pairs_file,
):
    """Make configurations of a kind of training (`kinds.py`), 2 layers, 16 wide, with dropout.

    All have words for tokens and a vocabulary of 128, which any mesh divides.
    """
    records = {
        "seq2seq": "parallel:{}|{}".format(*parallel_files),
        "transcription": f"audio:{spoken_file}",
        "classification": f"tsv:{labeled_file}",
        "span_qa": f"squad:{squad_file}",
        "token_classification": f"conll:{tagged_file}",
        "chat": f"jsonl:{chat_file}",
        "dpo": f"jsonl:{pairs_file}",
    }
    labels = {"classification": "good,bad", "token_classification": "O,B-PER,B-LOC"}

    def make(kind, **overrides):
        objective, family = kind.split()[:2]
        values = {
            "objective.name": objective,
            "model.family": family,
            "model.n_layers": 2,
            "model.d_model": 16,
            "model.n_heads": 4,
            "model.vocab_size": 128,
            "model.dropout": 0.1,
            "model.attention_dropout": 0.1,
            "data.source": records.get(objective, f"text:{text_file}"),
            "data.validation_source": records.get(objective, ""),
            "data.validation_fraction": 0.2,
            "data.documents": "line",
            "data.labels": labels.get(objective, ""),
            "data.tokenizer": "words",
            "data.sequence_length": 16,
            "data.batch_size": 8,
            "data.workers": 1,
            "optimizer.learning_rate": 1e-2,
            "log.tensorboard": False,
        }
        return _config(values | KINDS[kind], overrides)

    return make


@pytest.fixture
def tiny_config(text_file):
    """Make configurations of a 2-layer model 32 wide that reads `text_file` as bytes.

    `tiny_config(seed=1, model__norm="rmsnorm")` sets seed and model.norm.
    """

    def make(**overrides):
        values = {
            "model.n_layers": 2,
            "model.d_model": 32,
            "model.n_heads": 4,
            "data.source": f"text:{text_file}",
            "data.documents": "line",
            "data.validation_fraction": 0.2,
            "data.sequence_length": 32,
            "data.batch_size": 8,
            "data.workers": 1,
            "train.steps": 6,
            "checkpoint.every_steps": 3,
            "log.tensorboard": False,
        }
        return _config(values, overrides)

    return make


def _config(values, overrides):
    config = default()
    for path, value in {**values, **overrides}.items():
        set_value(config, path.replace("__", "."), value)
    return config
