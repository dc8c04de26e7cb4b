"""Report page: self-contained, escaped, and without errors in a browser at both widths."""

import base64
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import warnings

import numpy as np
import pytest
from runs import write_run

from lm.cli import main
from lm.tools.reports import report_page
from lm.tools.reports.run_records import final_metric, find_runs, swept_keys

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PROBE = """<script>
const seen = [];
for (const head of document.querySelectorAll("section:nth-of-type(2) th button")) {
  if (head.textContent === "optimizer.learning_rate") head.click();
}
const names = [...document.querySelectorAll("section:nth-of-type(2) tbody tr")];
parent.postMessage(JSON.stringify({
  width: document.documentElement.scrollWidth, seen: window.innerWidth,
  requests: performance.getEntriesByType("resource").map(entry => entry.name),
  order: names.map(row => row.cells[0].textContent),
}), "*");
</script>"""
# Chromium has no window of 400 pixels; a frame can be as narrow as it likes.
FRAME = """<!doctype html><script>onmessage = message => document.title = message.data</script>
<iframe src="page.html" width="{width}" height="900" style="border: 0"></iframe>"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports") / "sweep<b>"
    for i, rate in enumerate((0.1, 1e-3, 0.01)):
        values = {"optimizer.learning_rate": rate, "seed": 1}
        losses = [5.0 - 0.1 * step for step in range(30)]
        write_run(folder / f"run{i}", values, losses, validation=2.0 + i)
    answers = folder / "run0" / "eval" / "test-30"
    answers.mkdir(parents=True)
    row = {"source": "<script>alert(1)</script>", "prediction": "a & b"}
    (answers / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    (answers / "report.json").write_text(json.dumps({"step": 30, "bleu": 12.5}))
    assert main(["report", "--workdir", str(folder)]) == 0
    return folder / "report"


def test_page_is_whole_in_itself(sweep):
    text = (sweep / "index.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']*""", text)
    assert not re.findall(r"url\((?!#)", text)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "sweep&lt;b&gt;" in text
    assert text.count('<span class="dot"') == 3
    for piece in ("best validation loss", "2.0000", "run0", "12.5", "80.0%", "None."):
        assert piece in text


def test_plots_are_written(sweep):
    names = {file.name for file in sweep.glob("*.png")}
    loss = {f"loss_by_{axis}.png" for axis in ("step", "tokens", "FLOPs", "time")}
    assert names >= loss | {"final_by_optimizer.learning_rate.png", "time.png"}
    assert all((sweep / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_single_run(sweep, tmp_path):
    assert main(["report", "--workdir", str(sweep.parent / "run1"), "--output", str(tmp_path)]) == 0
    text = (tmp_path / "index.html").read_text()
    assert "One run: decoder, causal" in text
    assert not list(tmp_path.glob("final_by_*"))


def test_run_of_another_version_has_no_plot_of_missing_metrics(sweep, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(sweep.parent / "run1", run)
    saved = json.loads((run / "run.json").read_text())
    saved["config"]["model"]["gone"] = 1
    (run / "run.json").write_text(json.dumps(saved))
    assert main(["report", "--workdir", str(run)]) == 0
    pictures = {file.name for file in (run / "report").glob("loss_by_*")}
    assert pictures == {"loss_by_step.png", "loss_by_time.png"}


def test_only_the_script_of_the_page_may_run(sweep):
    text = (sweep / "index.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert re.search(r"script-src ([^;\"]*)", text)[1] == f"'sha256-{digest}'"


def test_run_has_one_color_in_every_picture_and_keeps_it_beside_others(tmp_path):
    """Fourteen runs, of which some lack an evaluation, and the first nine of them alone."""
    from matplotlib.colors import to_hex

    for i in range(14):
        values = {"optimizer.learning_rate": 10.0**-i}
        write_run(tmp_path / f"r{i:02}", values, [3.0, 2.0], validation=1.0 + i if i % 3 else None)

    def shown(n):
        runs = find_runs(*(tmp_path / f"r{i:02}" for i in range(n)))
        figures = report_page.loss_curves(runs) | report_page.metric_curves(runs)
        seen = {run.name: set() for run in runs}
        for figure in figures.values():
            for line in figure.axes[0].lines:
                if line.get_label() in seen:
                    seen[line.get_label()].add(to_hex(line.get_color()))
        (finals,) = report_page.final_by_key(runs, swept_keys(runs)).values()
        scored = [run.name for run in runs if run.final(final_metric(runs)) is not None]
        dots = np.concatenate([dots.get_facecolors() for dots in finals.axes[0].collections])
        at = np.concatenate([dots.get_offsets()[:, 0] for dots in finals.axes[0].collections])
        rates = {run.config["optimizer.learning_rate"]: run.name for run in runs}
        assert sorted(rates[x] for x in at) == scored
        for x, color in zip(at, dots, strict=True):
            seen[rates[x]].add(to_hex(color))
        return seen

    seen = shown(14)
    assert all(len(colors) == 1 for colors in seen.values()), seen
    assert len(set.union(*seen.values())) == 14
    assert shown(9).items() <= seen.items()


NAMES = ["_a", "$x", "a$b$c", r"\frac{$", "<b>", "é 日本", "a\nb", "\udcff", "x" * 200, "%s{0}"]


def test_every_name_of_runs_and_evaluations_and_several_folders(tmp_path):
    for i, name in enumerate(NAMES):
        run = write_run(tmp_path / "a" / name, {"data.source": f"text:{i}$"}, [3.0, 2.0], 1.0 + i)
        metrics = {"step": 2, f"eval/{name}/../x": 1.0, name: 2.0}
        (run / "metrics.jsonl").write_text(
            (run / "metrics.jsonl").read_text() + json.dumps(metrics) + "\n"
        )
        if i < 3:
            (run / "eval" / name).mkdir(parents=True)
            (run / "eval" / name / "report.json").write_text(json.dumps({name: 1.0}))
    other = write_run(tmp_path / "b" / "_a", {"seed": 1}, [1.0], 9.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of letters that a font does not have, too
        assert main(["report", "--workdir", str(tmp_path / "a"), str(other)]) == 0
    text = (tmp_path / "report" / "index.html").read_text()
    assert f"{len(NAMES) + 1} runs" in text
    for piece in ("a/_a", "a/a$b$c", "a/&lt;b&gt;", "a/é 日本", "9.5000"):
        assert piece in text
    assert not [f for f in tmp_path.rglob("*.png") if f.parent != tmp_path / "report"]


DAMAGE = ["", "{\n", "[]\n", "{}\n", "\ud800\n", '{"step": "x"}\n']


def test_report_names_what_is_damaged_and_continues(tmp_path, monkeypatch):
    """Any file of a run cut, emptied or with any value of another type."""
    monkeypatch.setattr(report_page, "save_png", lambda figure, file: None)
    monkeypatch.setattr(report_page, "svg", lambda figure: "")
    chance = random.Random(0)
    run = write_run(tmp_path / "run", {}, [3.0, 2.0], validation=2.0)
    (run / "eval" / "test-2").mkdir(parents=True)
    (run / "eval" / "test-2" / "report.json").write_text('{"step": 2, "bleu": 12.5}')
    (run / "eval" / "test-2" / "predictions.jsonl").write_text('{"source": "a", "text": "b"}\n')
    files = sorted(file for file in run.rglob("*.json*"))
    whole = {file: file.read_text() for file in files}

    def report(file, text):
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        made = report_page.write_page([run], tmp_path / "page").read_text()
        file.write_text(whole[file])
        return made

    for file in files:
        for text in DAMAGE:
            page = report(file, text)
            if text in ("{\n", "[]\n"):
                assert file.name in page, (file, text)
    values = [[], {}, "x", -1, 10**400, 1e308, float("nan"), True, None, {"a": [1]}]
    for _ in range(10):
        file = chance.choice(files)
        lines = whole[file].splitlines()
        row = json.loads(lines[0]) if file.suffix == ".jsonl" else json.loads(whole[file])
        node, name = row, chance.choice(list(row))
        while isinstance(node[name], dict) and node[name] and chance.random() < 0.9:
            node, name = node[name], chance.choice(list(node[name]))
        node[name] = chance.choice(values)
        report(file, json.dumps(row) + "\n")


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(sweep, tmp_path, width):
    """No message on the console, no request, nothing wider than the window; the table sorts."""
    page = tmp_path / "page.html"
    probe = hashlib.sha256(PROBE[8:-9].encode()).digest()  # without its tags
    allowed = f"script-src 'sha256-{base64.b64encode(probe).decode()}' "
    text = (sweep / "index.html").read_text().replace("script-src ", allowed)
    page.write_text(text.replace("</body>", f"{PROBE}</body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *flags, "--virtual-time-budget=5000", "--dump-dom", f"file://{frame}"],
        capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    assert found["width"] <= found["seen"] == width
    assert found["requests"] == []
    assert found["order"] == ["run1", "run2", "run0"]
