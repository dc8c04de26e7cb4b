"""A guard withholds outputs of some classes and counts them."""

import numpy as np
import pytest

from lm.decoding import guard as guards
from lm.decoding.generated import Generation, generation_record
from lm.decoding.guard import Guard
from lm.errors import UserError


class Classifier:
    """Find texts with an x likely bad."""

    def largest(self, texts, columns, windows):
        return np.array([0.9 if "x" in text else 0.2 for text in texts]), None


@pytest.fixture
def guard(monkeypatch):
    monkeypatch.setattr(guards, "class_columns", lambda *args: [1])
    monkeypatch.setattr(guards, "weights_digest", lambda workdir: "0")
    monkeypatch.setattr(guards, "load_classifier", lambda workdir, digest: Classifier())
    return Guard("run", "bad", 0.5)


def test_withheld_outputs_have_no_text_and_are_counted(guard):
    outputs = [
        [Generation(f"a{'x' * (i % 3 == 0)}", -1.0), Generation("b", -2.0)] for i in range(40)
    ]
    found = list(guard.screened([*outputs, []]))
    assert len(found) == 41
    for i, (generations, before) in enumerate(zip(found, outputs, strict=False)):
        assert generations[0].withheld == (i % 3 == 0)
        assert generations[0].text == ("" if i % 3 == 0 else before[0].text)
        assert generations[1] == before[1]
    assert guard.summary() == "guard: 14 of 80 outputs withheld"


def test_record_says_what_is_withheld(guard):
    ((first, second),) = guard.screened([[Generation("x", None), Generation("y", -1.0)]])
    assert generation_record("prompt", "p", [first], 1) == {
        "prompt": "p",
        "text": "",
        "withheld": True,
    }
    assert generation_record("prompt", "p", [second], 1) == {
        "prompt": "p",
        "text": "y",
        "score": -1.0,
    }


def test_guard_without_a_run_is_a_one_line_error():
    with pytest.raises(UserError, match=r"decode\.guard: no run in nowhere"):
        Guard("nowhere", "bad", 0.5)
