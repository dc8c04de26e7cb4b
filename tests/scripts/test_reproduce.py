"""scripts/reproduce.sh with a stand-in for `lm`: every command it gives is one that lm accepts."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from lm.cli import VERBS
from lm.cli.arguments import parse
from lm.config import load_config

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce.sh"
USAGE = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, check=False)
NAMES = re.findall(r"[a-z0-9-]+", USAGE.stderr.partition("one of")[2])


def test_without_a_name_it_lists_the_names():
    assert USAGE.returncode == 2
    assert {"multi30k", "tiny-bert", "wikitext2-lstm", "gpt2-small"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_one_that_lm_accepts(tmp_path, name):
    log = tmp_path / "log"
    (tmp_path / "lm").write_text(f'#!/bin/bash\nprintf "%q " "$@" >>{log}; echo >>{log}\n')
    (tmp_path / "python").write_text("#!/bin/bash\n")
    for program in ("lm", "python"):
        (tmp_path / program).chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LM_DATA_DIR": "data", "LM_MINILM": "minilm"}
    words = ["bash", SCRIPT, name, tmp_path / "runs"]
    subprocess.run(words, env=os.environ | own, check=True, capture_output=True)
    commands = [shlex.split(line) for line in log.read_text().splitlines()]
    assert any(command[0] == "train" for command in commands)
    for command in commands:
        args, overrides = parse(command, VERBS)
        if command[0] == "train":
            load_config(args.config, overrides)
