"""Each verb uses the configuration keys that it declares, and refuses every other one."""

from __future__ import annotations

import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import lm
from lm import config as configs
from lm.cli import VERBS, main
from lm.cli.arguments import parse, verb_module
from lm.cli.used_keys import is_used, without_effect
from lm.config.registries import SCHEMA
from lm.training.trainer import train

LIBRARY = Path(lm.__file__).parent
# Places that read keys of training whatever a verb does with the experiment that is built.
CHECKING = ("config/", "validation.py")
BUILDING = (
    *("optim/", "experiment.py:build_untraced", "experiment.py:<lambda>", "train_step.py:init"),
    *("runs/checkpoints.py", *CHECKING),
    "evaluation/scores.py:score_predictions",  # hands over what a metric declares
)


@pytest.fixture
def reads(monkeypatch):
    """Keys that are read, and the functions that read them, as FILE:FUNCTION from the reader up."""
    found = defaultdict(list)
    sections = defaultdict(set)
    for path in SCHEMA:
        section, _, name = path.rpartition(".")
        sections[section].add(name)
    get = ConfigDict.__getitem__

    def recorded(self, key):
        value = get(self, key)
        if not isinstance(value, ConfigDict):
            own = {name for name, item in self._fields.items() if not isinstance(item, ConfigDict)}
            for section, names in sections.items():
                if key in names and own == names:
                    found[f"{section}.{key}".lstrip(".")].append(_readers())
        return value

    monkeypatch.setattr(ConfigDict, "__getitem__", recorded)
    return found


def _readers():
    frame, readers = sys._getframe(2), []
    while frame := frame.f_back:
        if reader := _reader(frame.f_code):
            readers.append(reader)
    return tuple(readers)


@cache
def _reader(code):
    file = Path(code.co_filename)
    inside = file.is_relative_to(LIBRARY)
    return f"{file.relative_to(LIBRARY)}:{code.co_name}" if inside else ""


# Keys of objectives, sources and caches that these runs do not have, of checks against the mesh,
# and one that has an error of its own.
OTHERS = {
    *("data.doc_stride", "data.field", "data.validation_split", "data.source", "data.tokenizer"),
    *("data.end_token", "data.token_dtype", "data.shard_cache"),
    *("decode.guard_labels", "decode.guard_threshold"),
    *(
        key
        for key in SCHEMA
        if key.startswith(("objective.", "parallel.")) or key == "eval.batch_size"
    ),
}
KINDS = {
    "causal decoder": ["eval", "generate --prompt the"],
    "seq2seq encoder_decoder": ["eval --task", "generate --prompt one"],
    "transcription encoder_decoder": [
        "eval --task",
        "generate --input {file} --output {workdir}/o",
    ],
}


@pytest.mark.usefixtures("one_device")
def test_verb_uses_what_it_declares(make_kind, reads, tmp_path, capsys):
    read, declared = defaultdict(set), {}
    for kind, commands in KINDS.items():
        workdir = tmp_path / kind.replace(" ", "_")
        config = make_kind(kind, train__steps=1)
        train(config, workdir)
        for command in commands:
            file = config.data.source.partition(":")[2]
            verb, *words = command.format(file=file, workdir=workdir).split()
            words = [verb, *words, "--workdir", str(workdir)]
            args, _ = parse(words, VERBS)
            name = f"{verb} --task" * ("--task" in words) or verb
            used = args.module.used_keys(args)
            declared.setdefault(name, set()).update(key for key in SCHEMA if is_used(key, used))
            reads.clear()
            assert main(words) == 0, capsys.readouterr().err
            for key, places in reads.items():
                if any(not any(r.startswith(CHECKING) for r in place) for place in places):
                    read[name].add(key)
                own = [p for p in places if not any(r.startswith(BUILDING) for r in p)]
                assert not own or is_used(key, used), (command, key, own[0][:4])
    for name, keys in declared.items():
        of_verb = (found for other, found in read.items() if other.split()[0] == name.split()[0])
        assert not keys.difference(*of_verb, OTHERS), name


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("eval --workdir r", "optimizer.learning_rate"),
        ("eval --workdir r", "data.test_source"),
        ("eval --workdir r --split test", "data.validation_fraction"),
        ("eval --workdir r --task", "eval.max_batches"),
        ("eval --workdir r --task", "eval.best"),
        ("eval --workdir r", "eval.bleu_tokenizer"),
        ("eval --workdir r", "eval.metrics"),
        ("generate --workdir r", "model.dropout"),
        ("merge --workdir r --to x", "model.dtype"),
        ("vectors --vectors v.txt", "parallel.preset"),
        ("vectors --workdir r", "decode.beam_size"),
        ("export --workdir r --to x", "model.dtype"),
        ("import --from x --workdir r", "model.n_layers"),
        ("report --workdir r", "seed"),
        ("scaling --workdir r", "seed"),
        ("config --keys", "seed"),
        ("tokenizer train --source stdlib --vocab_size 9 --output x", "data.source"),
    ],
)
def test_any_other_key_is_a_one_line_error_before_anything_is_read(words, key, capsys):
    text = {bool: "true", int: "1", float: "0.5"}.get(SCHEMA[key].type, "x")
    assert main([*words.split(), f"--config.{key}={text}"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: --config.{key}: lm {words.split()[0]}")
    assert line.count("\n") == 1


def test_every_verb_declares_its_keys():
    for verb in VERBS:
        assert callable(verb_module(verb).used_keys), verb


def test_key_that_is_given_twice_is_an_error(capsys):
    words = ["config", "--config", "experiments/gpt2.py:124m", "--config.seed=1"]
    assert main([*words, "--config.seed", "1"]) == 0
    capsys.readouterr()
    assert main([*words, "--config.seed", "2"]) == 2
    assert "--config.seed is given twice: 1 and 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        ("optimizer.sgd.momentum=0.5 optimizer.adamw.b1=0.8 objective.mask_rate=0.3", 0b101),
        ("optimizer.name=muon optimizer.adamw.b1=0.8 optimizer.lion.b1=0.8", 0b001),
        ("schedule.name=step schedule.step_every=9 schedule.final_ratio=0.5", 0b001),
        ("lora.alpha=3 model.rope_factor=2 model.rope_scaling=linear", 0b111),
        ("model.positions=rotary model.rope_scaling=linear model.rope_factor=2 lora.rank=2", 0),
        ("data.header=False data.validation_source=jsonl:x data.field=y", 0b100),
        ("objective.mask_rate=0.15 eval.bleu_tokenizer=zh optimizer.name=adamw", 0),
        ("parallel.preset=fsdp parallel.mesh.fsdp=4 parallel.mesh.data=1", 0b011),
        ("model.family=lstm model.n_heads=2 model.d_hidden=8", 0b010),
    ],
)
def test_keys_without_effect_are_named(given, unused):
    words = [word.split("=") for word in given.split()]
    overrides = dict(words)
    config = configs.default()
    for path, text in words:
        configs.set_value(config, path, configs.parse_value(path, text))
    expected = [path for i, (path, _) in enumerate(reversed(words)) if unused >> i & 1][::-1]
    found = [line.split("=")[0] for line in without_effect(config, overrides)]
    assert found == [f"--config.{path}" for path in expected]


def test_command_continues_without_unused_keys(capsys):
    words = ["config", "--config", "experiments/gpt2.py:124m", "--config.optimizer.lion.b1=0.5"]
    assert main(words) == 0
    assert capsys.readouterr().err == (
        "note: --config.optimizer.lion.b1=0.5 has no effect: it needs --config.optimizer.name to "
        "be lion\n"
    )
