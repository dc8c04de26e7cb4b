"""Names and texts in any encoding, under any locale, work or give a one-line error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm.cli import main

ROOT = Path(__file__).parents[1]
ASCII = {
    "LC_ALL": "C",
    "PYTHONIOENCODING": "ascii",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
}
LATIN = os.fsdecode(b"caf\xe9")
CONFIG = """from lm.config import default
def get_config():
    config = default()
    config.paper = "Ærøskøbing 我们"
    return config
"""


def lm(*words, **variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "lm", *map(os.fspath, words)]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_locale_without_utf8_changes_no_name_and_no_file(tmp_path):
    file = tmp_path / "dänisch" / "kø.py"
    file.parent.mkdir()
    file.write_text(CONFIG, encoding="utf-8")
    code, out, _ = lm("config", "--config", file, **ASCII)
    assert code == 0
    assert r"paper = '\xc6r\xf8sk\xf8bing \u6211\u4eec'" in out
    code, out, err = lm("config", "--config", tmp_path / "né.py", **ASCII)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert r"n\xe9.py" in err


def test_file_name_that_is_not_utf8_is_opened(tmp_path):
    file = tmp_path / f"{LATIN}.py"
    file.write_text(CONFIG, encoding="utf-8")
    code, out, _ = lm("config", "--config", file)
    assert code == 0
    assert "paper = 'Ærøskøbing 我们'" in out


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--workdir", "run", "--prompt", LATIN],
        ["generate", "--workdir", "run", "--prompt", "a", "--stop", "\ud800"],
        ["eval", "--workdir", LATIN],
        ["report", "--workdir", LATIN],
        ["export", "--workdir", LATIN, "--to", "x"],
        ["merge", "--workdir", "run", "--to", LATIN],
    ],
)
def test_text_or_run_that_is_not_utf8_is_a_one_line_error(words, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "UTF-8" in err
    assert err.count("\n") == 1
    err.encode()
