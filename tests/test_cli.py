"""User errors give one line and exit code 2 without a traceback; and the verbs that print."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from lm.cli import VERBS, main
from lm.config import default
from lm.config.registries import SCHEMA

TINY = {
    "model.n_layers": 2,
    "model.d_model": 16,
    "model.n_heads": 2,
    "data.sequence_length": 8,
    "data.batch_size": 4,
    "data.validation_fraction": 0.2,
    "train.steps": 2,
    "parallel.mesh.data": 1,
    "parallel.preset": "custom",
    "log.tensorboard": False,
}


@pytest.fixture
def experiment(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text("to be, or not to be: that is the question.\n" * 20)
    lines = [f"    config.{key} = {value!r}" for key, value in TINY.items()]
    file = tmp_path / "tiny.py"
    source = f"    config.data.source = 'text:{tmp_path}/text.txt'\n"
    file.write_text(
        "from lm.config import default\n\n\ndef get_config():\n    config = default()\n"
        + source
        + "\n".join(lines)
        + "\n    return config\n"
    )
    return file


def error_of(capsys, *words: object) -> str:
    """The single line that a wrong command prints."""
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    assert code == 2, printed
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, printed.err
    assert "Traceback" not in printed.err
    return lines[0]


WRONG_CONFIGS = {
    "unknown key": (
        ["--config.train.stesp=3"],
        r"unknown key --config.train.stesp; did you mean --config.train.steps",
    ),
    "key of another section": (
        ["--config.model.batch_size=3"],
        "did you mean --config.data.batch_size",
    ),
    "section": (["--config.model=3"], "is a section"),
    "wrong type": (["--config.train.steps=many"], "expected an integer"),
    "wrong choice": (["--config.model.norm=layer"], "did you mean layernorm"),
    "out of range": (["--config.model.dropout=1.5"], "is above 0.99"),
    "below range": (["--config.train.steps=0"], "is below 1"),
    "not finite": (["--config.optimizer.learning_rate=nan"], "finite"),
    "no value": (["--config.train.steps"], "has no value"),
    "mesh": (["--config.parallel.mesh.fsdp=3"], "does not divide 1 devices"),
    "two free axes": (
        ["--config.parallel.mesh.data=-1", "--config.parallel.mesh.fsdp=-1"],
        "at most one",
    ),
    "heads": (["--config.model.n_heads=3"], "is not divisible by --config.model.n_heads=3"),
    "key/value heads": (["--config.model.n_kv_heads=3"], "n_kv_heads"),
    "microbatches": (
        ["--config.train.microbatches=3"],
        "not divisible by --config.train.microbatches",
    ),
    "missing file": (["--config.data.source=text:nowhere.txt"], "nowhere.txt"),
    "unknown source": (["--config.data.source=web:x"], "stdlib, text"),
    "unknown TFDS name": (["--config.data.source=tfds:no_such_thing"], "no_such_thing"),
    "unknown tokenizer": (["--config.data.tokenizer=morse"], "unknown tokenizer 'morse'"),
    "missing tokenizer file": (["--config.data.tokenizer=sentencepiece:no.model"], "no.model"),
    "too little text": (["--config.data.sequence_length=5000"], "too few for one window"),
    "small vocabulary": (["--config.model.vocab_size=10"], "smaller than the tokenizer's 257"),
    "no room for [MASK]": (
        [
            "--config.model.vocab_size=257",
            "--config.model.family=encoder",
            "--config.objective.name=masked",
        ],
        "tokenizer's 257 and 1 of --config.objective.name=masked",
    ),
    "family": (["--config.model.family=lstm", "--config.objective.name=prefix"], "needs --config"),
    "no documents": (["--config.data.source=tsv:x.tsv"], "tsv:x.tsv"),
    "weights": (["--config.data.weights=1,2"], "2 numbers for 1"),
    "coordinator alone": (["--coordinator", "localhost:1"], "must be given together"),
    "unknown option": (["--workdri", "x"], "unrecognized arguments"),
    "key as an option": (["--model.d_model=8"], "written --config.model.d_model=VALUE"),
    "key as a word": (["model.d_model=8"], "written --config.model.d_model=VALUE"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
@pytest.mark.usefixtures("one_device")
def test_wrong_configuration_is_a_one_line_error(capsys, experiment, tmp_path, case):
    words, expected = WRONG_CONFIGS[case]
    line = error_of(capsys, "train", "--config", experiment, "--workdir", tmp_path / "w", *words)
    assert expected in line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--config.model.n_heads=4", "--config.parallel.mesh.tensor=8"],
            "8 (--config.parallel.mesh.tensor)",
        ),
        (["--config.parallel.mesh.data=8"], "--config.data.batch_size=4 is not divisible by 8"),
        (["--config.parallel.mesh.data=3"], "does not divide 8 devices"),
        (
            [
                "--config.model.d_model=18",
                "--config.parallel.mesh.fsdp=4",
                "--config.parallel.mesh.data=2",
            ],
            "",
        ),
    ],
)
def test_mesh_that_does_not_fit_is_a_one_line_error(capsys, experiment, tmp_path, words, expected):
    line = error_of(capsys, "train", "--config", experiment, "--workdir", tmp_path / "w", *words)
    assert expected in line


BAD_TEXTS = {
    "empty": ("text", b"", "contains no text"),
    "undecodable": ("text", b"fine until \xff here", "11"),
    "not json": ("jsonl", b'{"text": "a"}\n{"text": \n', ":2"),
    "no field": ("jsonl", b'{"text": "a"}\n{"body": "b"}\n', ":2"),
    "field is a number": ("jsonl", b'{"text": 3}\n', ":1"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.usefixtures("one_device")
def test_bad_text_is_a_one_line_error_with_its_place(capsys, experiment, tmp_path, case, packed):
    kind, content, expected = BAD_TEXTS[case]
    file = tmp_path / f"bad.txt{'.gz' if packed else ''}"
    file.write_bytes(gzip.compress(content) if packed else content)
    source = f"--config.data.source={kind}:{file}"
    line = error_of(capsys, "train", "--config", experiment, "--workdir", tmp_path / "w", source)
    assert file.name in line
    assert expected in line


CLASSES = ["--config.objective.name=classification", "--config.data.validation_fraction=0.5"]
BAD_RECORDS = {
    "empty": (b"text\tlabel\na film\tgood\n\tbad\n", "films.tsv:3"),
    "another class": (b"text\tlabel\na film\tgood\na film\tso-so\n", "films.tsv:3"),
    "a cell too many": (b"text\tlabel\na film\tgood\tbad\n", "films.tsv:2"),
    "other columns": (b"sentence\trating\na film\tgood\n", "set --config.data.columns"),
    "undecodable": (b"text\tlabel\na \xff film\tgood\n", "films.tsv:2"),
    "no label": (b"text\na film\nanother film\n", "a record has no label (it has text)"),
    "a single record": (b"text\tlabel\na film\tgood\n", "leaves a split empty"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
@pytest.mark.usefixtures("one_device")
def test_bad_records_are_one_line_errors_with_their_place(capsys, experiment, tmp_path, case):
    content, expected = BAD_RECORDS[case]
    (tmp_path / "films.tsv").write_bytes(content)
    task = [
        *CLASSES,
        "--config.data.labels=good,bad",
        f"--config.data.source=tsv:{tmp_path}/films.tsv",
    ]
    line = error_of(capsys, "train", "--config", experiment, "--workdir", tmp_path / "w", *task)
    assert expected in line


def test_experiment_files_that_do_not_work_are_one_line_errors(capsys, tmp_path):
    def config_error(text: str) -> str:
        (tmp_path / "e.py").write_text(text)
        return error_of(capsys, "config", "--config", tmp_path / "e.py")

    assert "no experiment file" in error_of(capsys, "config", "--config", tmp_path / "none.py")
    assert "no get_config" in config_error("x = 1\n")
    assert "e.py:2: ZeroDivisionError" in config_error("x = 1\n1 / 0\n")
    assert "SyntaxError" in config_error("def (\n")
    assert "not a ConfigDict" in config_error("def get_config():\n    return {}\n")
    assert "unknown variant" in error_of(capsys, "config", "--config", "experiments/gpt2.py:9b")
    assert "SystemExit: 3" in config_error("raise SystemExit(3)\n")
    raises = "def get_config():\n    raise ValueError('no')\n"
    assert "e.py:2: ValueError: no" in config_error(raises)
    assert "SyntaxError" in config_error("x = '\0'\n")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("hostname", "x"),
        ("config.yaml", "model:\n  n_layers: 2\n"),
        ("config.py.bak", "def get_config(): pass\n"),
        ("folder.py", None),
        ("x" * 300 + ".py", ""),
        *(("run.json", text) for text in ("", "[]", "{}", '{"config": []}', "[" * 9999)),
        ("plugin.json", '{"config": {}, "plugins": [{"file": 3}]}'),
        ("folder.json", None),
    ],
)
def test_non_experiment_file_is_a_one_line_error_with_its_name(capsys, tmp_path, name, content):
    file = tmp_path / name
    if content is None:
        file.mkdir()
    elif len(name) < 255:
        file.write_text(content)
    assert str(file) in error_of(capsys, "config", "--config", file)


@pytest.fixture
def trained(experiment, tmp_path, one_device, capsys) -> Path:
    assert main(["train", "--config", str(experiment), "--workdir", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    assert "validation loss" in printed.out
    assert "Traceback" not in printed.err
    return tmp_path / "run"


def test_run_evaluates_to_the_same_loss_and_generates(trained, capsys):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    logged = next(row for row in rows if "eval/validation/loss" in row)
    assert main(["eval", "--workdir", str(trained), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    for name, value in logged.items():
        assert evaluated[name] == pytest.approx(value, rel=1e-6), name

    words = ["generate", "--workdir", str(trained), "--prompt", "to", "--prompt", "be", "--json"]
    assert main([*words, "--max_new_tokens", "3", "--greedy"]) == 0
    several = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in several] == ["to", "be"]
    assert (
        main(
            [
                "generate",
                "--workdir",
                str(trained),
                "--prompt",
                "to",
                "--greedy",
                "--max_new_tokens",
                "3",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == f"to{several[0]['text']}\n"


def test_run_is_evaluated_at_its_steps_and_on_any_text(trained, capsys, tmp_path):
    def evaluate(*words):
        assert main(["eval", "--workdir", str(trained), "--json", *map(str, words)]) == 0
        return json.loads(capsys.readouterr().out)

    newest = evaluate()
    assert evaluate("--step", 2) == newest
    (tmp_path / "other.txt").write_text("whether 'tis nobler in the mind to suffer\n" * 9)
    source = f"text:{tmp_path}/other.txt"
    other = evaluate("--source", source)
    assert other["source"] == source
    # All of the named text, whatever part of the run's own was held out.
    assert other[f"eval/{source}/targets"] == 9 * 42 + 1  # with the end
    assert other[f"eval/{source}/loss"] != newest["eval/validation/loss"]
    wrong = {
        ("--step", "1"): "no checkpoint of step 1 in",
        ("--step", "2,x"): "is not a list of steps",
        ("--step", "2", "--best"): "give one of them",
        ("--source", source, "--split", "test"): "give one of them",
        ("--source", ""): "is empty",
        ("--source", "text:none.txt"): "none.txt",
        ("--source", "nonsense:x"): "nonsense",
    }
    for words, expected in wrong.items():
        assert expected in error_of(capsys, "eval", "--workdir", trained, *words)


def test_continuation_ends_before_a_stop_text_and_continues_what_is_piped_in(
    trained, capsys, tmp_path, monkeypatch
):
    words = ["generate", "--workdir", str(trained), "--seed", "1", "--max_new_tokens", "20"]

    def generate(*more):
        assert main([*words, *map(str, more)]) == 0
        return capsys.readouterr().out

    (whole,) = json.loads(generate("--prompt", "to", "--json"))
    text = whole["text"]
    assert len(text) > 2
    stop = text[1:3]
    cut = text[: text.index(stop)]
    assert generate("--prompt", "to", "--stop", stop) == f"to{cut}\n"
    assert generate("--prompt", "to", "--stop", text + "never") == f"to{text}\n"
    (tmp_path / "in.txt").write_text("to\n")
    files = ["--input", tmp_path / "in.txt", "--output", tmp_path / "out.jsonl"]
    generate(*files, "--stop", "never", "--stop", stop)
    assert json.loads((tmp_path / "out.jsonl").read_text())["text"] == cut
    assert "stop" in error_of(capsys, *words, *files)
    assert "--stop is empty" in error_of(capsys, *words, "--stop", "")
    with (tmp_path / "in.txt").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert generate() == f"to{text}\n"


def test_two_runs_are_compared_on_a_page(trained, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("to\n\nbe\n")
    runs = ["--workdir", trained, trained]
    words = ["compare", "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "page"]
    assert main([*map(str, [*words, *runs]), "--max_new_tokens", "3"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page' / 'index.html'}\n"
    key = json.loads((tmp_path / "page" / "key.json").read_text())
    assert key["runs"] == [f"{trained}@2"] * 2
    assert len(key["first"]) == 2
    assert "--workdir A B" in error_of(capsys, *words, *runs[:2])
    assert "--workdir A B" in error_of(capsys, *words, *runs, trained)
    assert "use another --output" in error_of(capsys, *words, *runs)
    words[-1] = tmp_path / "other"
    assert "no run in" in error_of(capsys, *words, *runs[:2], tmp_path / "none")
    assert "none.txt" in error_of(capsys, *words, *runs, "--prompts", tmp_path / "none.txt")
    (tmp_path / "prompts.txt").write_text("\n")
    assert "has no prompts" in error_of(capsys, *words, *runs)


def test_misusing_a_run_is_a_one_line_error(trained, experiment, tmp_path, capsys):
    train = ["train", "--config", experiment, "--workdir", trained]
    line = error_of(capsys, *train, "--config.model.n_layers=3", "--config.optimizer.name=lion")
    assert "--config.model.n_layers: 2 → 3" in line
    assert "--config.optimizer.name: adamw → lion" in line

    line = error_of(capsys, "generate", "--workdir", trained, "--prompt", "x" * 50)
    assert "prompt 1 has 51 tokens; the context holds 8" in line
    assert "no run in" in error_of(capsys, "generate", "--workdir", tmp_path, "--prompt", "x")
    assert "no run in" in error_of(capsys, "eval", "--workdir", tmp_path / "nothing")
    assert "top_p" in error_of(capsys, "generate", "--workdir", trained, "--top_p", "1.5")
    line = error_of(capsys, "eval", "--workdir", trained, "--config.data.tokenizer=char")
    assert "tokenizer" in line

    (tmp_path / "text.txt").write_text("another text, as long as is needed here.\n" * 20)
    line = error_of(capsys, *train)
    assert "changed since the run" in line
    assert "text.txt" in line

    (trained / "run.json").write_text("{")
    # The newest checkpoint knows whose run it is.
    assert "changed since the run" in error_of(capsys, *train)


def test_workdir_that_is_a_file_is_a_one_line_error(capsys, experiment, tmp_path, one_device):
    (tmp_path / "w").write_text("")
    assert "--workdir" in error_of(
        capsys, "train", "--config", experiment, "--workdir", tmp_path / "w"
    )


@pytest.mark.parametrize("verb", VERBS)
def test_help_describes_every_option(capsys, verb):
    with pytest.raises(SystemExit) as stopped:
        main([*verb.split(), "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert VERBS[verb] in " ".join(shown.split())
    options = re.split(r"^  (?=-)", shown.partition("options:")[2], flags=re.M)[1:]
    bare = [option for option in options if not re.search(r"\S(\s{2,})\S", option)]
    assert not bare


def test_config_prints_every_key(capsys):
    assert main(["config", "--keys"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{path} = " in printed for path in SCHEMA)
    assert main(["config", "--config", "experiments/gpt2.py:355m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model.d_model"] == 1024


def test_params_prints_one_json_object(capsys):
    assert main(["params", "--config", "experiments/gpt2.py:124m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == 124_439_808


def test_params_shows_the_sharding_of_each_parameter(capsys, experiment):
    words = ["params", "--config", str(experiment), "--config.model.n_layers=4"]
    words += ["--config.parallel.mesh.stage=2", "--config.parallel.mesh.tensor=2"]
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["mesh"] == {"stage": 2, "tensor": 2}
    rows = {row["name"]: row for row in printed["parameters"]}
    assert sorted(rows) == sorted(printed["tensors"])
    query = rows["stack/layers/attention/query/kernel"]
    assert query["shape"] == [4, 16, 2, 8]
    assert query["axes"] == ["layers", "embed", "heads", "head_dim"]
    assert query["spec"] == ["stage", "fsdp", "tensor", None]
    assert query["role"] == "matrix"
    assert query["bytes"] == 4 * 4 * 16 * 2 * 8 // 4
    assert printed["bytes_per_device"] == sum(row["bytes"] for row in rows.values())
    assert printed["bytes_per_device"] < 4 * printed["total"]

    assert main(words) == 0
    text = capsys.readouterr().out
    assert "(stage, fsdp, tensor, None)" in text
    assert "bytes on each of 4 devices (stage=2, tensor=2)" in text
    line = error_of(capsys, *words, "--topology", "cpu:6")
    assert "does not divide 6 devices" in line
    assert "--topology goes with --config" in error_of(
        capsys, "params", "--all", "--topology", "cpu:4"
    )


def test_tokenizer_train_writes_a_model_that_trains(capsys, experiment, tmp_path, one_device):
    model = tmp_path / "out" / "small.model"
    source = f"text:{tmp_path}/text.txt"
    words = [
        "tokenizer",
        "train",
        "--source",
        source,
        "--vocab_size",
        "290",
        "--output",
        str(model),
    ]
    assert main(words) == 0
    overrides = [
        f"--config.data.tokenizer=sentencepiece:{model}",
        "--config.data.sequence_length=4",
    ]
    run = ["train", "--config", str(experiment), "--workdir", str(tmp_path / "w")]
    assert main([*run, *overrides]) == 0
    capsys.readouterr()
    assert "100000" in error_of(capsys, *words[:5], "100000", *words[6:])


def test_defaults_are_valid():
    from lm.config import validate

    validate(default())


def test_truncated_gz_file_is_a_one_line_error(capsys, experiment, tmp_path, one_device):
    file = tmp_path / "cut.txt.gz"
    file.write_bytes(gzip.compress(b"some text " * 1000)[:-10])
    source = f"--config.data.source=text:{file}"
    line = error_of(capsys, "train", "--config", experiment, "--workdir", tmp_path / "w", source)
    assert "cut.txt.gz" in line
