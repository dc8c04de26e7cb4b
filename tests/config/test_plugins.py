"""Plug-ins: a user's own objective, model family and source, outside the repository."""

from __future__ import annotations

import json
import shutil

import pytest
from plugins import forget_plugins

from lm import config as configs
from lm.cli import main
from lm.config.registries import OBJECTIVES, OPTIMIZERS, SCHEMA, SOURCES
from lm.config.registry import option
from lm.errors import UserError

MODEL_AND_SOURCE = '''
import hashlib
from dataclasses import dataclass

from lm.config.registries import MODELS, SOURCES
from lm.config.registry import option
from lm.data.sources import Chunk, DocumentSource
from lm.models.classic.feed_forward import Nplm, NplmConfig


@dataclass(frozen=True)
class GainOptions:
    gain: float = option(2.0, "Factor of the scores of the vocabulary.", low=0.1)


@dataclass(frozen=True)
class GainConfig(NplmConfig):
    gain: float = 1.0


@MODELS.register("gain", options=GainOptions, objectives=("causal",))
class Gain(Nplm):
    config: GainConfig

    def logits(self, x):
        return self.config.gain * super().logits(x)


@dataclass(frozen=True)
class CountingOptions:
    count_to: int = option(500, "Last number of the text.", low=1)


@SOURCES.register("counting", options=CountingOptions)
class Counting(DocumentSource):
    """The numbers from 1, a document each hundred."""

    def __init__(self, argument, data, split):
        self.name, self.count_to = "counting", data.count_to

    @property
    def digest(self):
        return hashlib.sha256(f"counting {self.count_to}".encode()).hexdigest()

    def chunks(self):
        for start in range(1, self.count_to, 100):
            yield Chunk(" ".join(map(str, range(start, start + 100))), True, True)
'''

CONFIG = """
import my_plugin
from lm.config import default


def get_config():
    config = default()
    config.model.family, config.model.gain = "gain", 1.5
    config.model.d_model = 8
    config.data.source, config.data.validation_fraction = "counting", 0.2
    config.data.sequence_length, config.data.batch_size = 8, 4
    config.train.steps, config.log.tensorboard = 2, False
    return config
"""


@pytest.fixture(autouse=True)
def _fresh_process():
    forget_plugins()
    yield
    forget_plugins()


@pytest.fixture
def folder(tmp_path):
    """A folder with a configuration and the plug-in that it imports."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "my_plugin.py").write_text(MODEL_AND_SOURCE)
    (folder / "config.py").write_text(CONFIG)
    return folder


def train(folder, workdir, *words):
    return main(["train", "--config", f"{folder}/config.py", "--workdir", str(workdir), *words])


def error_of(capsys, *words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


def write(folder, plugin):
    (folder / "my_plugin.py").write_text(
        "from dataclasses import dataclass\n"
        "from lm.config.registry import option\n"
        "from lm.config.registries import *\n" + plugin
    )


# --- a run


@pytest.mark.usefixtures("one_device")
def test_run_remembers_its_plugins(folder, tmp_path, capsys):
    run, words = tmp_path / "run", ["--config.model.gain=3", "--config.data.count_to=900"]
    assert train(folder, run, *words) == 0
    saved = json.loads((run / "run.json").read_text())
    assert saved["config"]["model"]["gain"] == 3.0
    (plugin,) = saved["plugins"]
    assert plugin["file"] == str(folder / "my_plugin.py")
    assert plugin["registers"] == {"data source": ["counting"], "model family": ["gain"]}

    for verb in (
        ["eval", "--workdir", run, "--json"],
        ["generate", "--workdir", run, "--prompt", "1 2", "--max_new_tokens", "2"],
        ["train", "--config", run / "run.json", "--workdir", tmp_path / "again"],
        ["params", "--config", run / "run.json"],
    ):
        forget_plugins()
        assert main([str(word) for word in verb]) == 0, capsys.readouterr().err
    forget_plugins()
    assert train(folder, run, *words) == 0  # goes on

    forget_plugins()
    (folder / "my_plugin.py").unlink()
    line = error_of(capsys, "eval", "--workdir", run)
    assert "the run uses the data source 'counting' of" in line
    assert "my_plugin.py, which does not exist" in line


@pytest.mark.usefixtures("one_device")
def test_run_beside_a_plugin_does_not_depend_on_it(folder, tmp_path, text_file):
    """In a process that imported a plug-in for another run."""
    configs.load_config(f"{folder}/config.py")
    plain = tmp_path / "plain"
    plain.mkdir()
    text = CONFIG.replace("import my_plugin", "").replace('"counting"', f"'text:{text_file}'")
    text = text.replace('config.model.gain = "gain", 1.5', 'unused = "nplm", 0')
    (plain / "config.py").write_text(text)
    run = tmp_path / "run"
    assert train(plain, run, "--config.data.tokenizer=byte", "--config.train.stop_at=1") == 75
    assert "gain" not in json.loads((run / "run.json").read_text())["config"]["model"]
    forget_plugins()
    shutil.rmtree(folder)
    assert train(plain, run, "--config.data.tokenizer=byte") == 0
    assert main(["eval", "--workdir", str(run)]) == 0


# --- keys


def test_options_are_keys_like_any(folder, capsys):
    load = ["config", "--config", f"{folder}/config.py"]
    assert "model.gain=0.0 is below 0.1" in error_of(capsys, *load, "--config.model.gain=0")
    assert "expected a number" in error_of(capsys, *load, "--config.model.gain=big")
    line = error_of(capsys, *load, "--config.model.gane=2")
    assert "unknown key --config.model.gane; did you mean --config.model.gain?" in line
    line = error_of(capsys, *load, "--config.model.family=gian")
    assert "gain" in line
    line = error_of(capsys, *load, "--config.objective.name=masked")
    assert "objective.name=masked needs --config.model.family encoder, not gain" in line
    assert SCHEMA["model.gain"].help == "Factor of the scores of the vocabulary."


def test_schema_without_plugins_has_none_of_their_keys():
    assert "model.gain" not in SCHEMA
    assert "gain" not in SCHEMA["model.family"].choices


# --- wrong plug-ins


WRONG = {
    "name of the library": (
        "@OPTIMIZERS.register('adamw')\ndef mine(*args): ...\n",
        "optimizer 'adamw' already exists (part of the library",
    ),
    "name that no key can hold": (
        "@OPTIMIZERS.register('my optimizer')\ndef mine(*args): ...\n",
        "optimizer 'my optimizer': names consist of a-z, 0-9 and _",
    ),
    "key of the library": (
        "@dataclass\nclass O:\n    z_loss: float = option(1.0, 'Mine.')\n"
        "@OBJECTIVES.register('mine', options=O)\nclass Mine: ...\n",
        "--config.objective.z_loss already exists",
    ),
    "section that is a key of the library": (
        "@dataclass\nclass O:\n    rate: float = option(1.0, 'Mine.')\n"
        "@OPTIMIZERS.register('decay', options=O)\ndef mine(*args): ...\n",
        "--config.optimizer.decay already exists",
    ),
    "field that is no key": (
        "@dataclass\nclass O:\n    plain: int = 3\n"
        "@OBJECTIVES.register('mine', options=O)\nclass Mine: ...\n",
        "declare plain with option(DEFAULT, HELP)",
    ),
    "default without a type of a key": (
        "@dataclass\nclass O:\n    table: object = option(None, 'Mine.')\n"
        "@OBJECTIVES.register('mine', options=O)\nclass Mine: ...\n",
        "table=None",
    ),
    "options that are no dataclass": (
        "@OBJECTIVES.register('mine', options=dict)\nclass Mine: ...\n",
        "is not a dataclass",
    ),
    "error": ("1 / 0\n", "config.py:2: ZeroDivisionError"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_plugin_is_a_one_line_error(folder, capsys, case):
    plugin, expected = WRONG[case]
    write(folder, plugin)
    assert expected in error_of(capsys, "config", "--config", f"{folder}/config.py")


def test_two_plugins_cannot_share_a_name(folder, capsys):
    (folder / "my_plugin_2.py").write_text(MODEL_AND_SOURCE)
    config = (folder / "config.py").read_text()
    (folder / "config.py").write_text("import my_plugin_2\n" + config)
    line = error_of(capsys, "config", "--config", f"{folder}/config.py")
    assert "model family 'gain' already exists (registered by" in line
    assert "my_plugin_2.py" in line


def test_plugin_that_lost_its_name_is_a_one_line_error(folder, tmp_path, capsys):
    configs.load_config(f"{folder}/config.py")
    saved = {"plugins": SCHEMA.plugins(), "config": {}}
    saved["config"] = {"model": {"family": "gain"}}
    (tmp_path / "run.json").write_text(json.dumps(saved))
    forget_plugins()
    write(folder, "")
    line = error_of(capsys, "config", "--config", tmp_path / "run.json")
    assert "no longer registers the model family 'gain'" in line


# --- locations of files


def test_modules_of_the_same_name_in_two_folders(folder, tmp_path):
    """Each configuration file gets the module beside it."""
    other = tmp_path / "other"
    other.mkdir()
    (folder / "config.py").write_text(CONFIG.replace("import my_plugin", "import my_plugin_table"))
    for where, source in ((folder, "stdlib"), (other, "text:x")):
        (where / "my_plugin_table.py").write_text(f"SOURCE = {source!r}\n")
        (where / "config.py").write_text(
            "import my_plugin_table\nfrom lm.config import default\n\n"
            "def get_config():\n    config = default()\n"
            "    config.data.source = my_plugin_table.SOURCE\n    return config\n"
        )
    for where, source in ((folder, "stdlib"), (other, "text:x"), (folder, "stdlib")):
        assert configs.load_config(f"{where}/config.py").data.source == source


def test_plugin_in_a_package_is_imported_as_one(folder, tmp_path, capsys):
    package = folder / "my_plugins"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "names.py").write_text("NAME = 'mine'\n")
    (package / "plain.py").write_text(
        "from lm.config.registries import SCHEDULES\nfrom .names import NAME\n"
        "@SCHEDULES.register(NAME)\ndef mine(peak, options, start, end): ...\n"
    )
    (folder / "config.py").write_text(
        "import my_plugins.plain\nfrom lm.config import default\n\n"
        "def get_config():\n    config = default()\n"
        "    config.schedule.name = 'mine'\n    return config\n"
    )
    config = configs.load_config(f"{folder}/config.py")
    plugins = SCHEMA.plugins()
    run = {"config": json.loads(config.to_json()), "plugins": plugins}
    (tmp_path / "run.json").write_text(json.dumps(run))
    forget_plugins()
    assert configs.load_config(str(tmp_path / "run.json")).schedule.name == "mine"


def test_configuration_file_itself_may_register(folder, tmp_path):
    (folder / "config.py").write_text(
        "from dataclasses import dataclass\nfrom lm.config.registry import option\n"
        "from lm.config import default\nfrom lm.config.registries import OPTIMIZERS\n\n"
        "@dataclass\nclass Options:\n    b3: float = option(0.5, 'Third decay.', low=0.0)\n\n"
        "@OPTIMIZERS.register('mine', options=Options)\ndef mine(*args): ...\n\n"
        "def get_config():\n    config = default()\n"
        "    config.optimizer.name = 'mine'\n    return config\n"
    )
    config = configs.load_config(f"{folder}/config.py", {"optimizer.mine.b3": "0.25"})
    assert config.optimizer.mine.b3 == 0.25
    assert (
        configs.load_config(f"{folder}/config.py").optimizer.mine.b3 == 0.5
    )  # registering twice is no conflict
    plugins = SCHEMA.plugins()
    run = {"config": json.loads(config.to_json()), "plugins": plugins}
    (tmp_path / "run.json").write_text(json.dumps(run))
    forget_plugins()
    assert configs.load_config(str(tmp_path / "run.json")).optimizer.mine.b3 == 0.25


def test_registries_say_what_they_know():
    with pytest.raises(UserError, match=r"unknown optimizer 'adam'; did you mean adamw\? \(known:"):
        OPTIMIZERS["adam"]
    assert set(SOURCES) >= {"stdlib", "text", "jsonl", "tfds"}
    assert "causal" in OBJECTIVES
    assert option(1, "One.").metadata["key"].default == 1
