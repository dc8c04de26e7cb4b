"""Decoding without the packages of extras."""

from __future__ import annotations

import subprocess
import sys

MODULES = ("lm.api", "lm.decoding.best_of", "lm.decoding.generate_file")


def test_jinja2_is_only_needed_for_conversations():
    code = f"import sys; sys.modules['jinja2'] = None; import {', '.join(MODULES)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
