"""scripts/structure.py on packages of a few lines: its counts."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


structure, record_calls = _load(SCRIPTS / "structure.py"), _load(SCRIPTS / "record_calls.py")


@pytest.fixture
def write_package(tmp_path):
    def write(name="lm", **files):
        for path, source in files.items():
            file = tmp_path / name / f"{path.replace('__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
            (file.parent / "__init__.py").touch()
        return tmp_path

    return write


def test_blank_lines_comments_and_docstrings_are_no_code():
    source = '''"""Module,
of two lines."""

import os  # counts


def f(x):
    """Function."""
    # comment
    text = """a string

    counts whole"""
    return text
'''
    assert structure.code_lines(source) == 6


def test_cycles_are_groups_that_reach_each_other():
    edges = [("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "d"), ("e", "f"), ("f", "e")]
    assert structure.cycles(edges) == [["a", "b", "c"], ["e", "f"]]


def test_reentry_is_an_entry_into_a_file_that_was_left():
    calls = [("", "a"), ("a", "b"), ("b", "b"), ("a", "a"), ("a", "b"), ("b", "c")]
    counts = structure.count_entries(structure.entries(calls))
    assert counts == {"entries": 5, "files": 3, "re-entries": 2, "from outside": 1}


def test_imports_are_counted_by_file_and_folder(write_package):
    root = write_package(
        models__decoder="from lm.models import layers\nfrom lm import errors\n",
        models__layers="from . import norms\nfrom ..errors import UserError\n",
        models__norms="import typing\nif typing.TYPE_CHECKING:\n    import lm.models.layers\n",
        errors="class UserError(Exception):\n    import json\n",
        training__loop="from lm.models.decoder import x\ndef f():\n    import lm.errors\n",
    )
    result = structure.measure_imports(root)
    assert result["files"] == 8
    edges = result["edges"]
    assert list(edges["module-level"].values()) == [5, 3, 2, 2]
    assert list(edges["with lazy"].values()) == [6, 4, 3, 3]
    assert structure.faults(result, 0, 0) == []


def test_folder_and_its_subfolder_are_not_siblings(write_package):
    modules = {"models__registry": "import lm.models.classic.lstm", "models__layers": ""}
    root = write_package(**modules, models__classic__lstm="from lm.models import layers")
    result = structure.measure_imports(root)
    assert result["folder cycles, module-level"] == ["lm.models lm.models.classic"]
    assert result["sibling cycles, module-level"] == []
    write_package(models__layers="import lm.models.classic.gru", models__classic__gru="")
    result = structure.measure_imports(root)
    assert result["sibling cycles, module-level"] == ["lm.models.classic lm.models.layers"]


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"models__a": "import lm.models.b", "models__b": "import lm.models.a"}, "file cycles"),
        (
            {
                "models__a": "import lm.data.a",
                "data__a": "",
                "data__b": "import lm.models.b",
                "models__b": "",
            },
            "sibling cycles",
        ),
        (
            {"models__a": "def f():\n    from lm.training import trainer", "training__trainer": ""},
            "upward",
        ),
        ({"utils__a": ""}, "on no floor: lm.utils"),
    ],
)
def test_check_fails(write_package, files, fault):
    words = [sys.executable, SCRIPTS / "structure.py", "imports", "--json", "--check"]
    words += ["--checkout", write_package(**files)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(fault)
    assert json.loads(done.stdout)["files"] == len(files) + len(
        {f.partition("_")[0] for f in files}
    )


def test_call_site_is_recorded_once_and_imports_not(write_package, monkeypatch):
    root = write_package(
        "made_up",
        outer="""
from made_up import inner

def run(config):
    for _ in range(3):
        inner.double(config)
    helper(1)
    return list(map(lambda x: x, inner.numbers()))

def helper(x):
    return inner.double(x)
""",
        inner="""
def double(x):
    return 2 * x

def numbers():
    yield double(1)
    yield double(1)
""",
        idle="def double(x):\n    return x\n",
    )
    monkeypatch.syspath_prepend(root)
    from made_up import idle, outer  # noqa: F401

    recorder = record_calls.Recorder(root / "made_up", lambda value: value == "config")
    recorder.start()
    outer.run("config")
    recorder.stop()
    (calls,) = recorder.threads.values()
    assert list(calls.values()) == [
        ("", "outer.py", True),
        ("outer.py", "inner.py", True),
        ("outer.py", "outer.py", False),
        ("outer.py", "inner.py", False),
        ("outer.py", "inner.py", False),
        ("inner.py", "inner.py", False),
        ("outer.py", "outer.py", False),
        ("inner.py", "inner.py", False),
    ]
    assert recorder.files == {"outer.py", "inner.py"}
