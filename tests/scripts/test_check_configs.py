"""Damaged configurations are refused by one line, or obey the schema (scripts/check_configs.py)."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_structure import SCRIPTS, _load

from lm.config import default, load_config
from lm.errors import UserError

script = _load(SCRIPTS / "check_configs.py")


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_damaged_configuration_is_valid_or_a_one_line_error(seed):
    config, done = script.damaged_config(random.Random(seed))
    assert not script.problem_of(config, 8), done


def test_schema_violations_are_found(monkeypatch):
    monkeypatch.setattr(script, "check", lambda *args: None)
    for path, value in {
        "eval.every_steps": True,
        "model.dropout": float("nan"),
        "seed": -1,
        "model.norm": "layer",
    }.items():
        config = default()
        section, _, name = path.rpartition(".")
        with config.unlocked(), config.ignore_type():
            (config[section] if section else config)[name] = value
        assert path in script.problem_of(config, 8)


@pytest.mark.parametrize("line", ["del c.optimizer", "del c.optimizer.adamw", "c.optimizer = 3"])
def test_override_of_a_section_that_the_file_removed_is_a_one_line_error(tmp_path, line):
    file = tmp_path / "removed.py"
    body = f"  c = default()\n  with c.unlocked(), c.ignore_type(): {line}\n  return c\n"
    file.write_text(f"from lm.config import default\ndef get_config():\n{body}")
    with pytest.raises(
        UserError, match=r"adamw.b1: the configuration does not have this key's section"
    ):
        load_config(str(file), {"optimizer.adamw.b1": "0.5"})
