"""Run with two checkpoints for all tests of safety sets, and small data files."""

import jax
import pytest

from lm.cli import main

CONFIG = """
from lm.config import default

def get_config():
    config = default()
    config.model.n_layers, config.model.d_model, config.model.n_heads = 1, 32, 2
    config.data.source, config.data.documents = "text:{text}", "line"
    config.data.validation_fraction, config.data.workers = 0.2, 1
    config.data.sequence_length, config.data.batch_size = 32, 8
    config.train.steps, config.checkpoint.every_steps, config.checkpoint.keep_last = 6, 3, 2
    config.eval.every_steps, config.eval.safety, config.eval.safety_every = 3, "winobias", 6
    config.safety.winobias, config.safety.limit = "{data}/winobias", 2
    config.log.tensorboard = False
    return config
"""
PAIRS = [
    ("age", "old models read slowly", "new models read slowly"),
    ("age", "the old one is small", "the new one is small"),
    ("religion", "a token of text now", "every token of text now"),
]


@pytest.fixture(scope="package")
def safety_data(tmp_path_factory):
    """Folder with CrowS-Pairs and WinoBias of three pairs a file."""
    folder = tmp_path_factory.mktemp("safety_data")
    rows = "".join(f'{i},"{more}","{less}",{kind}\n' for i, (kind, more, less) in enumerate(PAIRS))
    (folder / "pairs.csv").write_text(f",sent_more,sent_less,bias_type\n{rows}")
    (folder / "winobias").mkdir()
    for kind in ("type1", "type2"):
        for part in ("dev", "test"):
            for side, pronoun in (("pro", "he"), ("anti", "she")):
                lines = (f"{i} [The model] reads and [{pronoun}] is {i}.\n" for i in range(1, 4))
                name = f"{side}_stereotyped_{kind}.txt.{part}"
                (folder / "winobias" / name).write_text("".join(lines))
    return folder


@pytest.fixture(scope="package")
def run_folder(text_file, safety_data, tmp_path_factory):
    """A trained run with checkpoints of the steps 3 and 6, and a safety set at the last."""
    folder = tmp_path_factory.mktemp("safety")
    (folder / "config.py").write_text(CONFIG.format(text=text_file, data=safety_data))
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: first)
        words = ["--config", str(folder / "config.py"), "--workdir", str(folder / "run")]
        assert main(["train", *words]) == 0
    return folder / "run"


@pytest.fixture(scope="module", autouse=True)
def one_device(one_device_in_module):
    """What these tests run sees one device, and what is run after them all again."""


@pytest.fixture
def evaluate(run_folder, safety_data, capsys):
    """Run `lm eval --safety` on the run; gives stdout, or the error's one line."""

    def evaluate(*words, **keys):
        keys = {
            "safety.crows_pairs": "pairs.csv",
            "safety.winobias": "winobias",
            "safety.limit": 0,
        } | keys
        keys = {"data.directory": str(safety_data)} | keys
        options = [f"--config.{path.replace('__', '.')}={value}" for path, value in keys.items()]
        code = main(["eval", "--workdir", str(run_folder), *words, *options])
        printed = capsys.readouterr()
        if code == 0:
            return printed.out
        assert code == 2
        assert "Traceback" not in printed.err
        return printed.err.splitlines()[-1].removeprefix("error: ")

    return evaluate
