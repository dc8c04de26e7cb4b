"""The interface: registry information without JAX, and objectives from outside the library."""

import json
import sys

import jax
import pytest
from kinds import KINDS

from lm.cli import main
from lm.config.registries import OBJECTIVES
from lm.experiment import build

PLUGIN = '''
"""Two objectives: the token after the next one, and a yes-or-no question about a text."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import optax

from lm.config.registries import OBJECTIVES
from lm.config.registry import option
from lm.data.store import token_windows
from lm.objectives.losses import token_loss
from lm.objectives.objective import LossSums, Objective


@dataclass(frozen=True)
class AheadOptions:
    ahead: int = option(2, "How many tokens ahead the target is.", low=1)


@OBJECTIVES.register("ahead", options=AheadOptions)
@dataclass(frozen=True)
class Ahead(Objective):
    families: ClassVar = ("decoder",)
    length: int
    ahead: int

    @classmethod
    def from_config(cls, config, tokenizer):
        return cls(config.data.sequence_length, config.objective.ahead)

    @property
    def shapes(self):
        names = ("inputs", "targets")
        row = (self.length,)
        return {**dict.fromkeys(names, (row, "int32")), "weights": (row, "float32")}

    def examples(self, store, training):
        return token_windows(store, self.length + self.ahead - 1, self.length, False, training)

    def features(self, example, rng):
        n = self.length
        weights = example["weights"][self.ahead - 1 :]
        tokens = example["tokens"]
        return {"inputs": tokens[:n], "targets": tokens[self.ahead :], "weights": weights}

    def loss(self, model, batch):
        x_BLD = model.hidden(batch["inputs"])
        return token_loss(model, x_BLD, batch["targets"], batch["weights"])


@OBJECTIVES.register("yes_no")
@dataclass(frozen=True)
class YesNo(Objective):
    families: ClassVar = ("encoder",)
    columns: ClassVar = ("text", "label")
    task: ClassVar = "predict"
    has_perplexity: ClassVar = False
    length: int

    @classmethod
    def from_config(cls, config, tokenizer):
        return cls(config.data.sequence_length)

    @property
    def shapes(self):
        names = ("inputs", "segment_ids")
        scalars = dict.fromkeys(("label", "weights"), ((), "float32"))
        return {**dict.fromkeys(names, ((self.length,), "int32")), **scalars}

    def examples(self, store, training):
        self.require_columns(store)
        return store

    def features(self, example, rng):
        row = {name: np.zeros(*shape) for name, shape in self.shapes.items()}
        tokens = example.tokens["text"][: self.length]
        row["inputs"][: len(tokens)] = tokens
        row["segment_ids"][: len(tokens)] = 1
        row["label"][...] = example.raw["label"] == "good"
        row["weights"][...] = 1
        return row

    def predict(self, model, batch):
        segments = batch["segment_ids"]
        x_BLD = model.hidden(batch["inputs"], None, segments)
        return model.classify(model.pooled(x_BLD, segments))[:, 0]

    def loss(self, model, batch):
        loss_B = optax.sigmoid_binary_cross_entropy(self.predict(model, batch), batch["label"])
        weights = batch["weights"]
        return LossSums((loss_B * weights).sum(), weights.sum(), {})

    @property
    def metrics(self):
        return ("accuracy",)

    def answers(self, stores, outputs):
        return ["good" if score > 0 else "bad" for score in outputs]

    def reference(self, record):
        return record.raw["label"]
'''


@pytest.mark.parametrize("name", OBJECTIVES)
def test_registry_says_what_the_class_says(name):
    entry, objective = OBJECTIVES.entries[name], OBJECTIVES[name]
    for attribute in ("families", "columns", "has_prefix", "predicts_every_token"):
        assert getattr(entry, attribute) == getattr(objective, attribute), attribute


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_one_meaning_have_one_name(make_kind, kind):
    shapes = build(make_kind(kind), jax.devices()[:1]).objective.shapes
    assert "inputs" in shapes
    assert "weights" in shapes or "skip_gram" in kind
    if "targets" in shapes:
        assert shapes["targets"][0] == shapes["weights"][0]
    for name in ("positions", "token_types"):
        assert shapes.get(name, shapes["inputs"]) == shapes["inputs"]


@pytest.fixture
def plugin(tmp_path):
    """A Python file outside the library that registers two objectives when it is imported."""
    (tmp_path / "my_objectives.py").write_text(PLUGIN)
    yield tmp_path
    sys.modules.pop("my_objectives", None)
    OBJECTIVES.entries = {name: e for name, e in OBJECTIVES.entries.items() if not e.plugin}
    OBJECTIVES.version += 1


@pytest.fixture
def train(plugin, one_device, capsys):
    """Train an experiment that imports the plug-in for two steps, then evaluates it."""

    def run(*words):
        assert main([str(word) for word in words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    def train(settings, *evaluate):
        lines = "".join(f"    config.{key} = {value!r}\n" for key, value in settings.items())
        (plugin / "experiment.py").write_text(
            "import my_objectives\nfrom lm.config import default\n\n\n"
            f"def get_config():\n    config = default()\n{lines}    return config\n"
        )
        workdir = plugin / "run"
        run("train", "--config", plugin / "experiment.py", "--workdir", workdir)
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == [1, 2]
        return json.loads(run("eval", "--workdir", workdir, "--json", *evaluate))

    return train


TINY = {
    "model.n_layers": 1,
    "model.d_model": 16,
    "model.n_heads": 2,
    "data.sequence_length": 16,
    "data.batch_size": 4,
    "data.validation_fraction": 0.5,
    "data.documents": "line",
    "data.workers": 1,
    "train.steps": 2,
    "log.tensorboard": False,
}


def test_objective_of_documents_from_outside_trains_and_is_evaluated(train, text_file):
    found = train(
        TINY | {"objective.name": "ahead", "objective.ahead": 3, "data.source": f"text:{text_file}"}
    )
    assert found["step"] == 2
    assert found["eval/validation/perplexity"] > 1
    assert "eval/validation/bits_per_byte" not in found


def test_objective_of_records_from_outside_is_scored(train, labeled_file):
    source = {"data.source": f"tsv:{labeled_file}", "data.labels": "good,bad"}
    values = {"objective.name": "yes_no", "model.family": "encoder"}
    found = train(TINY | source | values, "--task")
    assert found["n"] == 24
    assert 0 <= found["accuracy"] <= 100
