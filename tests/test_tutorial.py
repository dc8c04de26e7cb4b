"""`experiments/tutorial.ipynb` runs from beginning to end."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

NOTEBOOK = Path(__file__).parents[1] / "experiments" / "tutorial.ipynb"


def test_tutorial_runs(one_device, monkeypatch, capsys):
    matplotlib.use("Agg")
    monkeypatch.chdir(NOTEBOOK.parent)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    namespace: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
    pretrained, finetuned = (namespace["losses"](name)[1] for name in ("pretrained", "finetuned"))
    assert pretrained[-1] < pretrained[0] - 1
    assert finetuned[-1] < finetuned[0]
    assert namespace["weights"].shape[:3] == (2, 1, 4)
    assert all(cell.get("outputs", []) == [] for cell in cells)
    assert "(1, 22) (1, 22, 257) (1, 22, 64)" in capsys.readouterr().out
