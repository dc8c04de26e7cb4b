"""The reference of preferences: stored with the model, LoRA's base, or precomputed."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from commands import evaluations, losses
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.cli import main
from lm.runs.saved_params import mean_params, saved_checkpoints
from lm.training.trainer import train

PLAIN = {"model.dropout": 0.0, "model.attention_dropout": 0.0, "train.steps": 2}


@pytest.fixture
def saved():
    """Return the parameters of a run's checkpoint, by path."""

    def saved(workdir, step):
        checkpoints = {c.step: c for c in saved_checkpoints(workdir, lambda line: None)}
        shapes = {**checkpoints[step].shapes, **checkpoints[step].frozen}
        mesh = NamedSharding(Mesh(jax.devices()[:1], "x"), PartitionSpec())
        return mean_params([checkpoints[step]], 1, dict.fromkeys(shapes, mesh), print)[0]

    return saved


@pytest.mark.usefixtures("one_device")
def test_reference_is_what_training_starts_from_and_under_lora_the_base(
    make_kind, tmp_path, capsys, saved
):
    """Losses begin at log 2; what is evaluated and generated later is as in training."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    config, said = make_kind("dpo decoder", **PLAIN, **{"checkpoint.every_steps": 1}), []
    assert train(config, first, log=said.append)
    assert any("the reference is untrained" in line for line in said)
    one, two = saved(first, 1), saved(first, 2)
    frozen = [path for path in two if path.startswith("frozen/")]
    assert 2 * len(frozen) == len(two)
    for path in frozen:
        assert one[path].tobytes() == two[path].tobytes()
        assert two[path].tobytes() != two[path.removeprefix("frozen/reference/")].tobytes()
    once = make_kind("dpo decoder", **PLAIN, **{"checkpoint.every_steps": 1})
    once.objective.reference = "precomputed"
    assert train(once, third)
    assert losses(third) == losses(first)
    shutil.rmtree(third / "checkpoints" / "2")
    shutil.rmtree(third / "reference")  # is computed again, from what training started from
    assert train(once, third)
    assert losses(third) == losses(first)
    assert evaluations(third) == pytest.approx(evaluations(first), rel=1e-6)  # other programs
    keys = {**PLAIN, "init.from": str(first), "lora.rank": 2, "data.tokenizer": f"run:{first}"}
    assert train(make_kind("dpo decoder", **keys), second)
    base = saved(second, 2)
    assert not [path for path in base if path.startswith("lora/")]
    for path in frozen:
        own = two[path.removeprefix("frozen/reference/")]
        assert base[path].tobytes() == own.tobytes()
    assert main(["eval", "--workdir", str(third), "--config.objective.reference=beside"]) == 2
    assert "has no frozen model, which --config.objective.name=dpo" in capsys.readouterr().err
    for run in (first, second, third):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert rows[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
        assert main(["eval", "--workdir", str(run), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        for name in ("loss", "accuracy", "reward_margin"):
            figure = f"eval/validation/{name}"
            expected = next(row[figure] for row in rows if figure in row)
            assert found[figure] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    arguments = ("--prompt", "one", "--max_new_tokens", "2", "--json")
    assert main(["generate", "--workdir", str(second), *arguments]) == 0
