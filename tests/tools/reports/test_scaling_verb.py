"""`lm scaling` of a table and of a folder of runs."""

import json

import numpy as np
import pytest
from runs import write_run

from lm.cli import main
from lm.tools.reports.scaling_law import Law, runs_of_folder

TRUTH = Law(E=1.5, A=300.0, B=900.0, alpha=0.35, beta=0.33)


def write_table(file, rows):
    lines = [f"{n!r},{6 * n * d!r},{loss!r}" for n, d, loss in rows]
    file.write_text("\n".join(["Model Size,Training FLOP,loss", *lines]) + "\n")
    return file


def test_json_of_a_table_with_pictures(tmp_path, capsys):
    rows = [
        (float(n), float(c / (6 * n)), float(TRUTH.loss(n, c / (6 * n))))
        for c in (1e18, 1e19, 1e20)
        for n in TRUTH.optimum(c)[0] * np.geomspace(0.3, 3, 5)
    ]
    rows.append((1e9, 1e8, 9.0))  # a tenth of a token a parameter: left out
    table, pictures = write_table(tmp_path / "runs.csv", rows), tmp_path / "pictures"
    words = ["--runs", str(table), "--budget", "1e21", "--resamples", "20"]
    assert main(["scaling", *words, "--output", str(pictures), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["alpha"] == pytest.approx(TRUTH.alpha, rel=1e-2)
    assert found["E"] == pytest.approx(TRUTH.E, rel=1e-2)
    assert {"E", "A", "B", "alpha", "beta"} <= found["intervals"].keys()
    assert found["budgets"][0]["n"] == pytest.approx(TRUTH.optimum(1e21)[0], rel=0.05)
    assert len(found["isoflop"]["profiles"]) == 3
    assert "left out: 1 runs" in printed.err
    assert {file.name for file in pictures.iterdir()} == {"isoflop.png", "fit.png", "optimum.png"}
    assert main(["scaling", *words]) == 0
    assert "1e21 FLOPs: N " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Model Size,loss\n1,2\n", "no column 'Training FLOP'"),
        ("Model Size,Training FLOP,loss\n1e6,many,2\n", "line 2"),
        ("Model Size,Training FLOP,loss\n1e6,1e12,0\n", "line 2"),
        ("", "0 runs"),
    ],
)
def test_bad_table_is_a_one_line_error(tmp_path, capsys, text, message):
    (tmp_path / "runs.csv").write_text(text)
    assert main(["scaling", "--runs", str(tmp_path / "runs.csv")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_runs_of_a_folder_are_points_and_unfinished_ones_are_not(tmp_path):
    write_run(tmp_path / "a", {"model.d_model": 8}, losses=[3.0, 2.5], validation=2.25)
    write_run(tmp_path / "b", {"train.steps": 9}, losses=[3.0, 2.0], validation=2.0)
    runs, left_out = runs_of_folder(tmp_path)
    assert runs.loss.tolist() == [2.25]
    assert runs.d.tolist() == [2 * 4 * 8]  # steps × rows × tokens
    width, vocabulary, rows = 8, 64, 8
    block = 12 * width**2 + 13 * width  # kernels; biases and two norms, as in GPT-2
    assert runs.n.tolist() == [vocabulary * width + rows * width + 2 * block + 2 * width]
    assert left_out == ["b: not finished, at step 2 of 9"]
