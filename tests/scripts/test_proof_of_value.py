"""Comparison of two recordings, and the runs in a recording."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import pytest
from kinds import KINDS

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "proof_of_value.py"))
LOSSES = {"causal lstm [1 device]": [4.5, 4.25, 4.0], "prefix decoder [data=8]": [4.75, 4.5, 4.0]}


@pytest.fixture
def compare(tmp_path, capsys):
    """Compares LOSSES with other losses: the exit code, and what is printed."""

    def compare(after):
        files = tmp_path / "before.json", tmp_path / "after.json"
        for file, losses in zip(files, (LOSSES, after), strict=True):
            file.write_text(json.dumps({"versions": {}, "losses": losses}))
        return SCRIPT["compare"](*files), capsys.readouterr().out

    return compare


def test_equal_losses_pass_and_new_runs_may_come(compare):
    code, output = compare(LOSSES | {"masked encoder [1 device]": [4.0, 3.0, 2.0]})
    assert code == 0
    assert output == "2 of 2 runs bitwise equal, 1 only after\n"


def test_one_bit_fails_and_its_run_and_step_are_named(compare):
    changed = [4.75, math.nextafter(4.5, 5), 4.0]
    code, output = compare(LOSSES | {"prefix decoder [data=8]": changed})
    assert code == 1
    (row,) = (line for line in output.splitlines() if line.startswith("prefix"))
    assert row.split() == ["prefix", "decoder", "[data=8]", "2", "4.5", repr(changed[1])]
    assert "causal lstm" not in output


def test_run_that_is_gone_fails(compare):
    code, output = compare({"causal lstm [1 device]": LOSSES["causal lstm [1 device]"]})
    assert code == 1
    assert "prefix decoder [data=8]" in output


def test_every_objective_and_family_is_recorded_on_one_device_and_on_a_mesh():
    recorded = [name for name, *_ in SCRIPT["runs"]()]
    assert len(set(recorded)) == len(recorded)
    for kind in KINDS:
        prefix = " ".join(kind.split()[:2])
        assert any(name.startswith(prefix) and "[1 device]" in name for name in recorded), kind
        assert any(name.startswith(prefix) and "=2" in name for name in recorded), kind
