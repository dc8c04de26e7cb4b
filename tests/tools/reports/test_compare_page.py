"""`lm compare`: contents of the blind page, and the win rate of its answers."""

import base64
import hashlib
import json
import re

import pytest

from lm.cli import main
from lm.errors import UserError
from lm.tools.reports.compare_page import win_rate, write_compare_page

RUNS = ["runs/secret_a@1", "runs/secret_b@2"]
PROMPTS = [f"prompt {i} </script><b>" for i in range(40)]
TEXTS = [f"a{i}" for i in range(40)], [f"b{i}" for i in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    assert write_compare_page(folder, RUNS, PROMPTS, TEXTS, 3) == folder / "index.html"
    return folder


def data_of(folder):
    text = (folder / "index.html").read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_page_is_blind_and_its_key_tells_the_runs_apart(folder, tmp_path):
    text, data = (folder / "index.html").read_text(), data_of(folder)
    key = json.loads((folder / "key.json").read_text())
    assert "secret" not in text
    assert "</script><b>" not in text
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']*""", text)
    assert [pair["prompt"] for pair in data["pairs"]] == PROMPTS
    left = [("ab"[run] + str(i)) for i, run in enumerate(key["first"])]
    right = [("ba"[run] + str(i)) for i, run in enumerate(key["first"])]
    assert [pair["left"] for pair in data["pairs"]] == left
    assert [pair["right"] for pair in data["pairs"]] == right
    assert 10 < sum(key["first"]) < 30
    assert key["runs"] == RUNS
    write_compare_page(tmp_path, RUNS, PROMPTS, TEXTS, 4)
    assert data_of(tmp_path)["page"] != data["page"] == key["page"]
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert re.search(r"script-src ([^;\"]*)", text)[1] == f"'sha256-{digest}'"


def answers(folder, file, winners):
    """Write the choices of a person who prefers run 0, run 1, neither ("tie") or has not chosen."""
    key = json.loads((folder / "key.json").read_text())
    choices = [
        {"tie": 0, None: None}.get(winner, 1 if winner == first else 2)
        for winner, first in zip(winners, key["first"], strict=True)
    ]
    file.write_text(json.dumps({"page": key["page"], "choices": choices}))
    return file


def test_win_rate_and_its_interval(folder, tmp_path, capsys):
    one = answers(folder, tmp_path / "1.json", [0] * 8 + [1] * 2 + ["tie"] * 5 + [None] * 25)
    found = win_rate(folder, [one])
    assert [found[name] for name in ("answers", "wins", "losses", "ties")] == [15, 8, 2, 5]
    # (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) of p = 0.8, n = 10, z = 1.96
    assert (found["win_rate"], found["low"], found["high"]) == pytest.approx(
        (80, 49.02, 94.33), abs=0.01
    )
    two = answers(folder, tmp_path / "2.json", [1] * 40)
    found = win_rate(folder, [one, two])
    assert (found["wins"], found["losses"], found["ties"]) == (8, 42, 5)
    none = answers(folder, tmp_path / "3.json", ["tie"] * 39 + [None])
    assert "win_rate" not in win_rate(folder, [none])
    assert main(["compare", "--output", str(folder), "--answers", str(one), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["wins"] == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "damaged JSON"),
        ("[]", "answers.json"),
        ({"page": "other"}, "no answers to the page"),
        ({"choices": [1]}, "not 40, one per pair"),
        ({"choices": "1" * 40}, "not 40, one per pair"),
        ({"choices": [3] * 40}, "1, 2, 0 or null, not 3"),
        ({"choices": [True] * 40}, "1, 2, 0 or null, not true"),
    ],
)
def test_bad_answers_are_one_line_errors(folder, content, message, tmp_path):
    file = tmp_path / "answers.json"
    if isinstance(content, dict):
        page = json.loads((folder / "key.json").read_text())["page"]
        file.write_text(json.dumps({"page": page} | content))
    elif content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        win_rate(folder, [file])


@pytest.mark.parametrize("key", [None, "{}", '{"page": 1, "runs": [], "first": [2]}'])
def test_folder_without_a_page_is_a_one_line_error(folder, key, tmp_path):
    if key is not None:
        (tmp_path / "key.json").write_text(key)
    file = answers(folder, tmp_path / "answers.json", [0] * 40)
    with pytest.raises(UserError, match=r"key\.json"):
        win_rate(tmp_path, [file])
