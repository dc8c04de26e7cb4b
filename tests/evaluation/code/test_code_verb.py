"""`lm eval --code` on a tiny run and on given samples."""

import json
import shutil

import pytest

from lm.cli import main
from lm.evaluation.code import completions, pass_rates
from lm.evaluation.code.completions import write_completions
from lm.evaluation.code.problems import Completion, read_problems
from lm.evaluation.code.sandbox import Limits, NotConfinedError, Verdict

PROBLEMS = [
    {
        "task_id": f"Test/{i}",
        "prompt": f'def add(x):\n    """Add {i}."""\n',
        "entry_point": "add",
        "canonical_solution": f"    return x + {i}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {1 + i}\n",
    }
    for i in range(2)
]


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    file = tmp_path_factory.mktemp("problems") / "adds.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return file


@pytest.fixture
def run(capsys):
    """Gives what a `lm eval` prints, or its error."""

    def evaluate(*words):
        code = main(["eval", *map(str, words)])
        printed = capsys.readouterr()
        return json.loads(printed.out) if code == 0 else printed.err.splitlines()[-1]

    return evaluate


def records(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_given_samples_are_run(run, problems, tmp_path):
    right, wrong = "    return x + 1\n", "    raise OSError(chr(0xD800))  # \ud800\n"
    rows = [("Test/1", right), ("Test/1", wrong), ("Test/0", wrong), ("Test/0", right)]
    file = tmp_path / "samples.jsonl"
    text = "".join(json.dumps({"task_id": name, "completion": c}) + "\n" for name, c in rows)
    file.write_text(text)
    words = ["--code", problems, "--samples", file, "--json"]
    found = run(*words, "--k", "1,2")
    figures = {"eval/code/adds/pass@1": 25.0, "eval/code/adds/pass@2": 50.0}
    assert found == {"samples": str(file), "problems": 2, "programs": 4, **figures}
    folder = tmp_path / "samples.jsonl-results"
    assert json.loads((folder / "report.json").read_text()) == found
    assert [row["passed"] for row in records(folder)] == [True, False, False, False]
    assert records(folder)[3]["reason"] == "AssertionError"
    assert records(folder)[1]["completion"] == wrong
    assert run(*words, "--k", "3") == "error: --k 3 needs as many samples of each problem, not 2"
    assert "give one of them" in run(*words, "--workdir", tmp_path)
    assert "--k is of --code" in run("--workdir", tmp_path, "--k", "1")
    missing = "the following arguments are required: --workdir"
    assert run() == f"error: lm eval: {missing}; see lm eval --help"
    assert "without --task" in run(*words, "--task")
    assert "--seed is of samples that a run writes" in run(*words, "--seed", "1")


def test_a_run_writes_samples_of_which_the_figures_are_kept(
    run, problems, tiny_run, one_device, tmp_path
):
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    found = run("--workdir", workdir, "--code", problems, "--n_samples", 2, "--json", "--seed", 3)
    assert found == {"step": 2, "problems": 2, "programs": 4, "eval/code/adds/pass@1": 0.0}
    rows = records(workdir / "eval" / "adds-2")
    assert [row["task_id"] for row in rows] == ["Test/0", "Test/0", "Test/1", "Test/1"]
    assert rows[0]["completion"] != rows[1]["completion"]
    assert not any("\ndef" in row["completion"] for row in rows)
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last == {"step": 2, "eval/code/adds/pass@1": 0.0}
    found = run("--workdir", workdir, "--code", problems, "--apply_chat_template", "--json")
    assert found["programs"] == 2
    assert all("reply" in row for row in records(workdir / "eval" / "adds-2"))


def test_a_process_that_cannot_be_confined_fails_its_sample_alone(monkeypatch, problems):
    def fail_first(program, tests, limits, calls=[]):  # noqa: B006
        calls.append(program)
        if len(calls) == 1:
            raise NotConfinedError("no memory")
        return Verdict(True, "", 0.1)

    monkeypatch.setattr(pass_rates, "run_tests", fail_first)
    samples = [Completion(problem, "") for problem in read_problems(problems)]
    found = pass_rates.run_samples(samples, Limits(), workers=1)
    assert [(row["passed"], row["reason"]) for row in found] == [
        (False, "not run: no memory"),
        (True, ""),
    ]


def test_prompts_that_fill_the_context_fail(monkeypatch, problems):
    monkeypatch.setattr(completions, "context_length", lambda model: 10)
    monkeypatch.setattr(completions, "prompt_ids", lambda *parts: [0] * 10)
    monkeypatch.setattr(completions.Controls, "from_config", lambda *parts: None)
    monkeypatch.setattr(completions, "sample_batches", lambda *parts, **options: iter(()))

    class Experiment:
        config = model = None

    found = write_completions(Experiment(), None, None, read_problems(problems), 2, None, 0)
    assert [completion.text for completion in found] == [None] * 4
