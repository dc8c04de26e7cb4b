"""Changes of a running experiment, and forks: differences are named and recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import arguments, losses

from lm.cli import main
from lm.config import load_config
from lm.data.batches import Batches
from lm.runs.workdir import first_row, metadata_at
from lm.tools.reports.run_records import read_run

pytestmark = pytest.mark.usefixtures("one_device_in_module")

PIECE = {"train__steps": 8, "eval__every_steps": 0, "checkpoint__every_steps": 4}


def lm(*words: str, code: int = 0) -> None:
    assert main([str(word) for word in words]) == code


def run_file(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


@pytest.fixture(scope="module")
def finished(experiment_file, tmp_path_factory, one_device_in_module) -> Path:
    """The workdir of a run of 8 steps."""
    run = tmp_path_factory.mktemp("finished") / "run"
    lm(*arguments(experiment_file, run, **PIECE))
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_finished_run_with_more_steps_equals_an_uninterrupted_one(
    experiment_file, run, tmp_path, capsys
):
    longer = PIECE | {"train__steps": 12, "schedule__name": "constant"}
    lm(*arguments(experiment_file, run, **longer), code=2)
    error = capsys.readouterr().err
    assert "--config.train.steps: 8 → 12" in error
    assert "--change" in error
    assert "history" not in run_file(run)
    for _ in range(2):  # a supervisor repeats the command
        lm(*arguments(experiment_file, run, **longer), "--change")
    assert run_file(run)["history"] == [
        {"step": 8, "changed": {"schedule.name": ["cosine", "constant"], "train.steps": [8, 12]}}
    ]
    lm(*arguments(experiment_file, run, **longer))
    assert list(losses(run)) == list(range(1, 13))

    # A constant rate from the start: the second of two changes does not undo the first.
    whole, piece = tmp_path / "whole", tmp_path / "piece"
    constant = longer | {"optimizer__learning_rate": 2e-3}
    lm(*arguments(experiment_file, whole, **constant))
    lm(*arguments(experiment_file, piece, **constant | {"train__steps": 8}))
    lm(*arguments(experiment_file, piece, **constant), "--change")
    assert losses(piece) == losses(whole)


def rows_read(monkeypatch) -> list[int]:
    """Indices of the rows that training reads from now on, in order."""
    read: list[int] = []
    row = Batches._row

    def recorded(self, index):
        if self.first_row:  # not those of an evaluation
            read.append(index)
        return row(self, index)

    monkeypatch.setattr(Batches, "_row", recorded)
    return read


def test_new_batch_size_continues_at_the_first_unseen_row(experiment_file, run, monkeypatch):
    for steps, size, start in ((12, 16, 8 * 8), (16, 24, 8 * 8 + 4 * 16)):
        read = rows_read(monkeypatch)
        changed = PIECE | {"train__steps": steps, "data__batch_size": size}
        lm(*arguments(experiment_file, run, **changed), "--change")
        monkeypatch.undo()
        assert read == list(range(start, start + 4 * size))
    assert list(losses(run)) == list(range(1, 17))


def test_first_row_counts_every_row_of_every_size():
    def metadata(*changes: tuple[int, int, int], now: int) -> dict:
        history = [{"step": s, "changed": {"data.batch_size": [a, b]}} for s, a, b in changes]
        return {"config": {"data": {"batch_size": now}}, "history": history}

    for changes, now, step in (
        ((), 8, 0),
        (((10, 8, 2),), 2, 10),
        (((10, 8, 2), (13, 2, 64)), 64, 13),
        (((0, 3, 5), (0, 5, 7), (4, 7, 1)), 1, 4),
    ):
        sizes, size = [], changes[0][1] if changes else now
        for at in range(step):
            for when, _, after in changes:
                size = after if when == at else size
            sizes.append(size)
        assert first_row(metadata(*changes, now=now)) + step * now == sum(sizes)


def test_change_moves_back_where_its_checkpoint_is_damaged(experiment_file, run):
    changed = PIECE | {"train__steps": 10, "optimizer__learning_rate": 5e-4}
    for file in (run / "checkpoints" / "8" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    lm(*arguments(experiment_file, run, **changed, train__stop_at=6), "--change", code=75)
    assert [entry["step"] for entry in run_file(run)["history"]] == [4]
    lm(*arguments(experiment_file, run, **changed))
    assert list(losses(run)) == list(range(1, 11))
    before = metadata_at(run_file(run), 4)["config"]
    assert before["optimizer.learning_rate"] == 1e-3
    assert metadata_at(run_file(run), 6)["config"]["optimizer.learning_rate"] == 5e-4


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ({"model__n_heads": 2}, "--config.model.n_heads"),
        ({"seed": 1}, "--config.seed"),
        ({"data__sequence_length": 8}, "--config.data.sequence_length"),
        ({"objective__name": "prefix"}, "--config.objective.name"),
        ({"optimizer__name": "lion"}, "--config.optimizer.name"),
        ({"optimizer__clip_norm": 0}, "this changes the training state"),
        ({"train__steps": 4}, "the run is at step 8"),
        ({"data__order": "contiguous", "data__batch_size": 16}, "--config.data.order"),
    ],
)
def test_fixed_keys_are_named_and_nothing_is_written(experiment_file, run, capsys, override, named):
    before = (run / "run.json").read_text()
    lm(*arguments(experiment_file, run, **PIECE | override), "--change", code=2)
    assert named in capsys.readouterr().err
    assert (run / "run.json").read_text() == before


def test_evaluation_and_logging_need_no_word(experiment_file, run):
    free = {"eval__every_steps": 3, "eval__max_batches": 1, "log__every_steps": 2}
    lm(*arguments(experiment_file, run, **PIECE | free))
    assert run_file(run)["config"]["eval"]["max_batches"] == 1
    assert "history" not in run_file(run)


def test_fork_continues_like_its_source(experiment_file, run, tmp_path, capsys):
    fork = tmp_path / "fork"
    words = arguments(experiment_file, fork, **PIECE)
    lm(*words, "--fork", f"{run}@4", "--config.train.stop_at=6", code=75)
    lm(*words, "--fork", f"{run}@4")  # the same command continues
    assert losses(fork) == losses(run)
    assert run_file(fork)["history"] == [{"step": 4, "forked_from": f"{run}@4"}]
    clock = json.loads((fork / "clock.json").read_text())
    assert clock["first_step"] == clock["steps_computed"] == 4
    assert clock["goodput"] <= 1

    lm(*arguments(experiment_file, tmp_path / "other", **PIECE), "--fork", f"{run}@5", code=2)
    assert f"no checkpoint of step 5 in {run}; there are 4, 8" in capsys.readouterr().err
    lm(*arguments(experiment_file, run, **PIECE), "--fork", str(fork), code=2)
    assert "holds a run already" in capsys.readouterr().err
    lm(*arguments(experiment_file, tmp_path / "other", **PIECE, seed=1), "--fork", run, code=2)
    assert "--config.seed" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_fork_changes_what_it_names(experiment_file, run, tmp_path, capsys):
    fork = tmp_path / "fork"
    changed = PIECE | {"train__steps": 10, "data__batch_size": 16}
    lm(*arguments(experiment_file, fork, **changed), "--fork", run)
    assert "changed from step 8 on: --config.data.batch_size: 8 → 16" in capsys.readouterr().err
    assert run_file(fork)["history"] == [
        {"step": 8, "forked_from": f"{run}@8"},
        {"step": 8, "changed": {"data.batch_size": [8, 16], "train.steps": [8, 10]}},
    ]
    assert list(losses(fork)) == list(range(1, 11))
    second = tmp_path / "second"
    lm(*arguments(experiment_file, second, **changed | {"train__steps": 12}), "--fork", fork)
    assert len(run_file(second)["history"]) == 4


def test_interrupted_fork_starts_over(experiment_file, run, tmp_path, monkeypatch, capsys):
    fork, words = tmp_path / "fork", arguments(experiment_file, tmp_path / "fork", **PIECE)
    monkeypatch.setattr("lm.runs.changes.upload_changes", lambda: 1 / 0)
    lm(*words, "--fork", f"{run}@4", code=1)
    monkeypatch.undo()
    (fork / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    capsys.readouterr()
    lm(*words, code=2)  # without the fork it would begin at step 0
    assert f"start it again with --fork {run}@4" in capsys.readouterr().err
    lm(*words, "--fork", f"{run}@4")
    assert losses(fork) == losses(run)


def test_run_json_as_a_configuration_is_what_was_given(experiment_file, run):
    run_json = run / "run.json"
    given = load_config(str(run_json))
    assert given.model.dtype == "auto"
    assert given.model.d_ff == given.model.vocab_size == given.model.max_length == 0
    resolved = run_file(run)["config"]["model"]
    assert (resolved["dtype"], resolved["d_ff"]) == ("float32", 128)
    lm(*arguments(run_json, run))  # the same run
    assert list(losses(run)) == list(range(1, 9))


def test_report_shows_changes_and_counts_tokens_by_them(experiment_file, run):
    changed = PIECE | {"train__steps": 10, "data__batch_size": 24}
    lm(*arguments(experiment_file, run, **changed), "--change")
    record = read_run(run, "run")
    assert record.tokens == (8 * 8 + 2 * 24) * 16
    assert record.batches([0, 4, 8, 9, 10]) == pytest.approx([0, 4 / 3, 8 / 3, 11 / 3, 14 / 3])
    lm("report", "--workdir", run)
    page = (run / "report" / "index.html").read_text()
    assert "Changes" in page
    assert "8 → 24" in page


def test_fork_needs_its_source_only_once_and_changes_only_at_its_start(
    experiment_file, run, tmp_path, capsys
):
    fork = tmp_path / "fork"
    words = arguments(experiment_file, fork, **PIECE | {"train__steps": 10})
    lm(*words, "--fork", f"{run}@8")
    lm(*words, "--fork", f"{run}@4", code=2)  # it came from step 8
    assert "holds a run already" in capsys.readouterr().err
    lm(*words, "--fork", run, "--config.optimizer.learning_rate=9e-4", code=2)
    assert "--change" in capsys.readouterr().err
    run.rename(tmp_path / "moved")
    lm(*words, "--fork", f"{run}@8")
    assert len(losses(fork)) == 10


@pytest.mark.parametrize(
    "damage", ["metadata is missing", "metadata of a step alone", "arrays", "a checksum"]
)
def test_damaged_source_is_named_before_anything_is_written(
    experiment_file, run, tmp_path, capsys, damage
):
    checkpoint = run / "checkpoints" / "8"
    match damage:
        case "metadata is missing":
            shutil.rmtree(checkpoint / "metadata")
        case "metadata of a step alone":
            (checkpoint / "metadata" / "metadata").write_text('{"step": 8}')
        case "a checksum":
            file = checkpoint / "metadata" / "metadata"
            metadata = json.loads(file.read_text())
            metadata["checksums"]["step"] += 1
            file.write_text(json.dumps(metadata))
        case "arrays":
            for file in (checkpoint / "state").rglob("*"):
                if file.is_file():
                    file.write_bytes(file.read_bytes()[:-1] + b"?")
    lm(*arguments(experiment_file, tmp_path / "fork", **PIECE), "--fork", run, code=2)
    error = capsys.readouterr().err
    assert f"{checkpoint} is damaged" in error
    assert "Traceback" not in error
    assert not (tmp_path / "fork").exists()


def test_empty_names_and_non_steps(experiment_file, run, tmp_path, capsys):
    named = shutil.copytree(run, tmp_path / "x@5")
    lm(*arguments(experiment_file, tmp_path / "fork", **PIECE), "--fork", named)
    for words in (
        [*arguments(experiment_file, tmp_path / "other", **PIECE), "--fork", f"{run}@²"],
        [*arguments(experiment_file, tmp_path / "other", **PIECE), "--fork", ""],
        arguments(experiment_file, "", **PIECE),
    ):
        lm(*words, code=2)
        error = capsys.readouterr().err
        assert "error: " in error
        assert "Traceback" not in error
    assert not (tmp_path / "other").exists()


def test_merged_run_resumes_where_its_source_was(experiment_file, run, tmp_path):
    changed = PIECE | {"train__steps": 10, "data__batch_size": 16}
    lm(*arguments(experiment_file, run, **changed), "--change")
    lm("merge", "--workdir", run, "--to", tmp_path / "merged")
    merged = run_file(tmp_path / "merged")
    assert merged["history"] == run_file(run)["history"]
    assert first_row(merged) == 8 * 8 - 8 * 16
    lm(*arguments(experiment_file, tmp_path / "merged", **changed))
    assert losses(tmp_path / "merged") == losses(run)


def test_best_by_another_figure_is_not_compared(experiment_file, run, capsys):
    lm(*arguments(experiment_file, run, **PIECE), "--change", "--config.eval.best=-loss")
    longer = arguments(experiment_file, run, **PIECE | {"train__steps": 10})
    lm(*longer, "--change", "--config.eval.best=-loss")
    lm(*longer, "--change", "--config.eval.best=accuracy", code=2)
    assert "has the best checkpoint by -loss" in capsys.readouterr().err


def test_source_is_added_at_the_end_of_training_as_if_it_had_been_planned(
    experiment_file, run, tmp_path, capsys
):
    (tmp_path / "better.txt").write_text("".join(f"{i} is even\n" for i in range(0, 900, 2)))
    before = load_config(str(experiment_file)).data.source
    annealed = PIECE | {
        "data__source": f"{before},text:{tmp_path / 'better.txt'}",
        "data__validation_fraction": 0.1,
        "data__schedule": "0: 1 0; 4: 1 0; 8: 1 3",
    }
    fork, whole = tmp_path / "fork", tmp_path / "whole"
    lm(*arguments(experiment_file, whole, **annealed))
    early = annealed | {"data__schedule": "0: 1 0; 3: 1 0; 8: 1 3"}
    lm(*arguments(experiment_file, fork, **early), "--fork", f"{run}@4", code=2)
    error = capsys.readouterr().err
    assert "a run cannot change --config.data.schedule, --config.data.source" in error
    lm(*arguments(experiment_file, fork, **annealed), "--fork", f"{run}@4")
    assert losses(fork) == losses(whole)
    steps = range(1, 5)
    assert [losses(fork)[step] for step in steps] == [losses(run)[step] for step in steps]
    (tmp_path / "better.txt").write_text("6 is odd\n" * 99)
    lm(*arguments(experiment_file, fork, **annealed), code=2)
    assert "better.txt" in capsys.readouterr().err
