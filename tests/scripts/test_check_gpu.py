"""The GPU check on a machine without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_gpu.py"


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_missing_gpu_is_a_one_line_error():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no GPU in this machine")
    assert done.stderr.count("\n") == 1
    assert not done.stdout
