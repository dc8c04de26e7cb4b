"""Parameters of other runs: reading, averaging, and that the runs are not changed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.config import default
from lm.errors import UserError
from lm.models.variables import Kind, ParamInfo, Role, flat, nested
from lm.runs.checkpoints import Checkpoints
from lm.runs.saved_params import mean_params, restore_params, saved_checkpoints
from lm.train_step import TrainState

ALPHA, RANK = 6.0, 2
SHAPES = {"head/kernel": (8, 4), "stack/layers/out/kernel": (2, 4, 2, 8)}
ADAPTERS = {
    "lora/stack/layers/out/kernel/a": (2, 4, 2, RANK),
    "lora/stack/layers/out/kernel/b": (2, RANK, 8),
}
ONE = NamedSharding(Mesh(jax.devices()[:1], "x"), PartitionSpec())
EVERYTHING = dict.fromkeys(SHAPES, ONE)


def params_at(step: int, shapes=SHAPES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {path: np.float32(rng.normal(size=shape)) for path, shape in shapes.items()}


def save(run: Path, steps: list[int], shapes=SHAPES) -> Path:
    options = default().checkpoint
    options.keep_last = 10
    checkpoints = Checkpoints(run / "checkpoints", options, {"config": {"lora": {"alpha": ALPHA}}})
    for step in steps:
        params = jax.tree.map(jnp.asarray, nested(params_at(step, shapes)))
        model_state = params.pop("model_state", {})
        moments = ({"mu": params}, {"count": jnp.asarray(step)})
        checkpoints.save(step, TrainState(jnp.asarray(step), params, moments, {}, model_state))
    checkpoints.close()
    return run


def read(source: Path, n: int = 1, shardings=EVERYTHING):
    """(parameters, steps, what was reported)."""
    said: list[str] = []
    found, steps = mean_params(saved_checkpoints(source, said.append), n, shardings, said.append)
    return found, steps, said


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def damage(run: Path, step: int) -> None:
    folder = run / "checkpoints" / str(step) / "state"
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_newest_parameters_come_back_bitwise(tmp_path):
    found, steps, said = read(save(tmp_path, [9, 10]))
    assert (steps, said) == ([10], [])
    assert found.keys() == SHAPES.keys()
    for path, leaf in params_at(10).items():
        assert np.asarray(found[path]).tobytes() == leaf.tobytes()


def test_only_what_is_named_is_read(tmp_path):
    found, _, _ = read(save(tmp_path, [1]), shardings={"head/kernel": ONE})
    assert found.keys() == {"head/kernel"}


def test_parameters_are_sharded_on_any_mesh(tmp_path):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
    found, _, _ = read(save(tmp_path, [1, 2]), n=2, shardings={"head/kernel": sharding})
    assert found["head/kernel"].sharding.is_equivalent_to(sharding, 2)
    expected = (params_at(1)["head/kernel"] + params_at(2)["head/kernel"]) / 2
    np.testing.assert_allclose(found["head/kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize("source", ["", "checkpoints/7"])
def test_average_is_the_mean_of_the_last(tmp_path, source):
    """Of a run, or up to one of its checkpoints."""
    found, steps, _ = read(save(tmp_path, [2, 5, 7, 11]) / source, n=3)
    assert steps == ([11, 7, 5] if source == "" else [7, 5, 2])
    for path in SHAPES:
        mean = np.mean([np.float64(params_at(step)[path]) for step in steps], axis=0)
        np.testing.assert_allclose(found[path], mean, rtol=1e-6, atol=1e-7)


def test_too_few_to_average_says_what_to_keep(tmp_path):
    save(tmp_path, [1, 2])
    with pytest.raises(UserError, match=r"has only 2; train with --config.checkpoint.keep_last=3"):
        read(tmp_path, n=3)


@pytest.mark.parametrize("kind", ["state", "metadata", "checksum"])
def test_damaged_checkpoint_is_reported_and_left_in_place(tmp_path, kind):
    save(tmp_path, [1, 2, 3])
    if kind == "state":
        damage(tmp_path, 3)
    else:
        file = tmp_path / "checkpoints" / "3" / "metadata" / "metadata"
        metadata = json.loads(file.read_text())
        metadata["checksums"]["params/head/kernel"] ^= 1
        file.write_text(json.dumps(metadata) if kind == "checksum" else "{")
    before = contents(tmp_path)
    found, steps, said = read(tmp_path)
    assert steps == [2]
    assert len(said) == 1
    assert "checkpoints/3 is damaged" in said[0]
    np.testing.assert_array_equal(found["head/kernel"], params_at(2)["head/kernel"])
    assert contents(tmp_path) == before


def test_checkpoint_that_is_being_written_is_left_alone(tmp_path):
    save(tmp_path, [1])
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "state"
    unfinished.mkdir(parents=True)
    assert read(tmp_path)[1:] == ([1], [])
    assert unfinished.is_dir()


@pytest.mark.parametrize("source", ["", "nothing", "checkpoints", "checkpoints/4"])
def test_no_checkpoint(tmp_path, source):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint in"):
        read(tmp_path / source)


def test_adapted_kernels_are_merged_before_they_are_averaged(tmp_path):
    save(tmp_path, [1, 2], SHAPES | ADAPTERS)
    said: list[str] = []
    assert saved_checkpoints(tmp_path, said.append)[0].shapes.keys() == SHAPES.keys()
    found, _, _ = read(tmp_path, n=2)
    assert found.keys() == SHAPES.keys()
    merged = []
    for step in (1, 2):
        x = {path: np.float64(leaf) for path, leaf in params_at(step, SHAPES | ADAPTERS).items()}
        a, b = x["lora/stack/layers/out/kernel/a"], x["lora/stack/layers/out/kernel/b"]
        delta = np.einsum("nhkr,nrd->nhkd", a, b)
        merged.append(x["stack/layers/out/kernel"] + ALPHA / RANK * delta)
    np.testing.assert_allclose(
        found["stack/layers/out/kernel"], np.mean(merged, axis=0), rtol=1e-5, atol=1e-5
    )


def test_heads_of_the_model_or_the_run_alone_can_be_skipped(tmp_path):
    """Parameters of layers, model state, and those of a module that both have, never are."""
    state = {"model_state/stack/router_bias": (2, 4)}
    source = save(tmp_path, [1], SHAPES | state | {"pooler/kernel": (4, 4)})

    def restore(extra, part, **options):
        own = SHAPES | state | extra
        shapes = {path: jax.ShapeDtypeStruct(x, "float32") for path, x in own.items()}
        infos = {path: ParamInfo(Role(Kind.MATRIX), ()) for path in SHAPES}
        infos |= {path: ParamInfo(Role(Kind.HEAD, part=part), ()) for path in extra}
        experiment = SimpleNamespace(
            inference_shapes=nested(shapes),
            inference_sharding=nested(dict.fromkeys(shapes, ONE)),
            param_infos=infos,
            config=SimpleNamespace(objective=SimpleNamespace(name="masked")),
        )
        params, _ = restore_params(experiment, source, print, **options)
        return flat(params)

    head = {"logit_bias/bias": (4,)}
    assert restore(head, "pretraining", heads_optional=True).keys() == {*SHAPES, *state}
    generator = {"generator/stack/layers/out/kernel": (2, 4)}
    assert restore(generator, "body", heads_optional=True).keys() == {*SHAPES, *state}
    for extra, part, options, expected in (
        (head, "pretraining", {}, "has no logit_bias/bias, which --config.objective.name=masked"),
        (head, "body", {"heads_optional": True}, "logit_bias/bias differs from the run"),
        ({"pooler/bias": (4,)}, "task", {"heads_optional": True}, "pooler/kernel differs from the"),
    ):
        with pytest.raises(UserError, match=expected):
            restore(extra, part, **options)
