"""The same model on any mesh: losses, gradients, shardings, and the communication compiled in."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered
from ml_collections import ConfigDict

from lm.config import default, set_value
from lm.data.batches import to_device
from lm.data.dataset import open_dataset
from lm.errors import UserError
from lm.experiment import Experiment, build, build_with_data, record_columns
from lm.models.variables import flat
from lm.parallel.mesh import AXES, axis_sizes, constrain, parameter_sharding
from lm.parallel.mesh_rules import replicated_axes
from lm.train_step import TrainState

MESHES = {
    "data=8": {"data": 8},
    "fsdp=8": {"fsdp": 8},
    "tensor=4": {"data": 2, "tensor": 4},
    "data=2,fsdp=2,tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
    "slice=2,fsdp=4": {"slice": 2, "fsdp": 4},
    "data=2,context=4": {"data": 2, "context": 4},
}


def config_on(mesh: dict[str, int], **overrides: object) -> ConfigDict:
    config = default()
    model, data = config.model, config.data
    model.n_layers, model.d_model, model.n_heads, model.n_kv_heads = 2, 32, 4, 2
    model.dropout = model.attention_dropout = 0.1
    model.vocab_size, model.activation, model.positions = 66, "swiglu", "rotary"
    data.sequence_length, data.batch_size = 16, 8
    config.train.steps = 20
    config.optimizer.learning_rate = 1e-2
    config.schedule.warmup_steps = 5
    config.parallel.mesh.update({"data": 1, **mesh})
    for path, value in overrides.items():
        section, key = path.split("__")
        config[section][key] = value
    return config


def experiment_on(mesh: dict[str, int], **overrides: object) -> Experiment:
    n = int(np.prod(list(mesh.values()))) if mesh else 1
    return build(config_on(mesh, **overrides), jax.devices()[:n])


def batches(experiment: Experiment, n: int) -> dict[str, jax.Array]:
    """`n` batches of random tokens in two packed documents a row."""
    rng = np.random.default_rng(0)
    data = experiment.config.data
    shape = (n, data.batch_size, data.sequence_length)
    tokens = (rng.integers(0, 66, shape, np.int32) ** 2) % 66  # some more often than others
    half = data.sequence_length // 2
    segments = np.broadcast_to(np.repeat([1, 2], [half, half]).astype(np.int32), shape)
    positions = np.broadcast_to(np.tile(np.arange(half, dtype=np.int32), 2), shape)
    arrays = {
        "inputs": tokens,
        "targets": np.roll(tokens, -1, axis=-1),
        "weights": (rng.random(shape) < 0.9).astype(np.float32),
        "segment_ids": segments,
        "positions": positions,
    }
    return jax.device_put(arrays, experiment.batch_sharding)


def first_state(experiment: Experiment) -> TrainState:
    """The initial state as NumPy arrays: other meshes start from it without compiling their own."""
    return jax.device_get(experiment.init_state())


def losses(experiment: Experiment, n: int = 20, start: TrainState | None = None) -> np.ndarray:
    """The losses of `n` updates, of the initial state or of `start`."""
    if start is None:
        state = experiment.init_state()
    else:
        state = jax.device_put(start, experiment.state_sharding)
    _, metrics = experiment.train_steps(state, batches(experiment, n))
    return np.asarray(metrics["loss"])


@pytest.fixture(scope="module")
def one_device_losses() -> np.ndarray:
    found = losses(experiment_on({}))
    assert found[-1] < found[0] - 0.05  # it learns: later losses depend on every update
    return found


@pytest.mark.parametrize("mesh", MESHES)
def test_twenty_losses_with_dropout_equal_those_of_one_device(mesh, one_device_losses):
    np.testing.assert_allclose(losses(experiment_on(MESHES[mesh])), one_device_losses, rtol=1e-5)


def test_microbatches_on_a_mesh_equal_one_batch_on_one_device(one_device_losses):
    found = losses(experiment_on({"data": 2, "fsdp": 2}, train__microbatches=2))
    np.testing.assert_allclose(found, one_device_losses, rtol=1e-5)


def test_8_bits_learn_the_same_on_a_mesh(one_device_losses):
    narrow = {"optimizer__moments": "int8", "train__precision": "fp8"}
    experiment = experiment_on({"fsdp": 2, "tensor": 2}, **narrow)
    found = losses(experiment, 8)
    np.testing.assert_allclose(found, one_device_losses[:8], rtol=0.01)
    assert not np.array_equal(found, one_device_losses[:8])
    wanted = flat(experiment.state_sharding.params)["stack/layers/feed_forward/in/kernel"].spec
    state = experiment.state_sharding.opt_state
    specs = [x.spec for path, x in jax.tree.leaves_with_path(state) if "'in'" in str(path)]
    assert specs.count(wanted) >= 2


def lowered(mesh: dict[str, int], **overrides: object) -> Lowered:
    experiment = experiment_on(mesh, **overrides)
    shapes = {
        name: jax.ShapeDtypeStruct((1, *s.shape), s.dtype)
        for name, s in experiment.batch_shapes.items()
    }
    return experiment.train_steps.lower(experiment.state_shapes, shapes)


def compiled_text(mesh: dict[str, int], **overrides: object) -> str:
    return lowered(mesh, **overrides).compile().as_text()


def collectives(text: str) -> set[str]:
    return set(re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", text))


def test_data_parallel_communicates_by_all_reduce_alone():
    assert collectives(compiled_text({"data": 8})) == {"all-reduce"}


def test_fsdp_gathers_parameters():
    assert "all-gather" in collectives(compiled_text({"fsdp": 8}))


def test_a_ring_gathers_no_sequence():
    """Keys pass from device to device; parameters, which all of them share, are gathered."""
    plain = {"model__attention_dropout": 0.0, "model__n_kv_heads": 4}
    text = compiled_text({"context": 8}, **plain)
    assert "collective-permute" in text
    assert "f32[8,16,32]" not in text  # nowhere a whole sequence of activations


def test_sequence_parallelism_cuts_what_lies_between_products():
    assert "f32[8,4,32]" in compiled_text({"tensor": 4})
    assert "f32[8,4,32]" not in compiled_text({"tensor": 4}, parallel__sequence=False)


def test_a_length_that_the_tensor_axis_does_not_divide():
    odd = {"data__sequence_length": 18, "train__loss_chunk": 9}
    found = losses(experiment_on({"data": 2, "tensor": 4}, **odd), 3)
    np.testing.assert_allclose(found, losses(experiment_on({}, **odd), 3), rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_in_blocks_of_the_vocabulary(tied):
    """Each block gathers its own part of the output layer; an embedding of inputs is whole."""
    more = {"model__vocab_size": 300, "model__tie_embeddings": tied, "model__dtype": "float32"}
    more |= {"objective__label_smoothing": 0.1, "objective__z_loss": 0.01}
    mesh, parts = {"fsdp": 4, "context": 2}, {"train__loss_chunk": 3}
    found = losses(experiment_on(mesh, **more, **parts), 3)
    np.testing.assert_allclose(found, losses(experiment_on({}, **more), 3), rtol=1e-5)
    text = compiled_text(mesh, **more, **parts)
    gathered = re.findall(r" = f32\[([\d,]+)\]\S* all-gather\(", text)
    assert ("128,32" if tied else "32,128") in gathered
    assert "32,300" not in gathered


def test_blocks_of_the_vocabulary_have_their_biases(make_kind):
    """Logits of masked tokens have a bias; a part is half of the vocabulary."""

    def found(mesh, n_devices, chunk):
        more = {"train__loss_chunk": chunk, "model__vocab_size": 300}
        config = make_kind("masked encoder", train__steps=2, **more)
        config.parallel.mesh.update({"data": 1, **mesh})
        experiment = build_with_data(config, jax.devices()[:n_devices])[0]
        dataset = open_dataset(experiment.config.data, record_columns(experiment.config))
        batches = experiment.train_batches(dataset)
        arrays = to_device(batches, range(2), experiment.batch_sharding)
        _, metrics = experiment.train_steps(experiment.init_state(), arrays)
        return np.asarray(metrics["loss"])

    np.testing.assert_allclose(found({"fsdp": 2}, 2, 1), found({}, 1, 0), rtol=1e-5)


def test_losses_in_parts_of_rows_with_fewer_targets_than_devices(make_kind):
    more = {"train__loss_chunk": 1, "model__vocab_size": 300, "model__attention_dropout": 0.0}
    config = make_kind("masked encoder", train__steps=2, **more)
    config.parallel.mesh.update({"data": 1, "context": 4})
    experiment = build_with_data(config, jax.devices()[:4])[0]
    shapes = {
        name: jax.ShapeDtypeStruct((1, *s.shape), s.dtype)
        for name, s in experiment.batch_shapes.items()
    }
    metrics = jax.eval_shape(experiment.train_steps, experiment.state_shapes, shapes)[1]
    assert metrics["loss"].shape == (1,)


def test_batches_are_cut_by_rows_and_by_length():
    experiment = experiment_on({"data": 2, "context": 4})
    assert batches(experiment, 1)["inputs"].sharding.shard_shape((1, 8, 16)) == (1, 4, 4)


def test_fsdp_keeps_an_eighth_of_every_large_parameter_and_its_moments():
    experiment = experiment_on({"fsdp": 8})
    state = experiment.init_state()
    for leaf in jax.tree.leaves(state):
        if leaf.size >= 8 * 32 and leaf.ndim > 2:
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size


def test_parts_of_a_sequence_share_parameters_where_they_divide_the_width():
    def parts(**overrides):
        experiment = experiment_on({"fsdp": 2, "context": 4}, **overrides)
        path = "stack/layers/feed_forward/out/kernel"
        leaf = flat(experiment.state_shapes.params)[path]
        return leaf.size // np.prod(
            flat(experiment.state_sharding.params)[path].shard_shape(leaf.shape)
        )

    assert parts() == 8
    assert parts(model__d_model=36, model__head_dim=8) == 2


def test_experts_whose_width_the_parts_of_a_sequence_do_not_divide_are_gathered_over_fsdp():
    """36 is not divisible by 8; the program would be refused when it is traced."""
    options = {"model__d_model": 36, "model__head_dim": 8, "model__n_experts": 4}
    assert "all_gather" in lowered({"fsdp": 2, "context": 4}, **options).as_text()


def test_factored_statistics_lie_like_what_is_left_of_their_parameter():
    config = config_on({"stage": 2, "fsdp": 2, "tensor": 2})
    config.optimizer.name, config.optimizer.adafactor.min_dim = "adafactor", 16
    experiment = build(config, jax.devices())
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec
        for path, sharding in jax.tree.leaves_with_path(experiment.state_sharding.opt_state)
    }
    of_rows, of_columns, whole, count = (
        next(spec for path, spec in found.items() if path.endswith(end))
        for end in (
            "v_row/stack/layers/feed_forward/out/kernel",
            "v_col/stack/layers/feed_forward/out/kernel",
            "v/stack/layers/feed_forward/in/bias",
            "count",
        )
    )
    assert {of_rows, of_columns} == {P("stage", "fsdp"), P("stage", "tensor")}
    assert whole == P("stage", "tensor")
    assert count in (P(), P("stage"))  # one a layer


def test_states_of_further_optimizers_lie_like_their_parameters():
    """Bases of SOAP are divided along one side, a neuron's mean square like its neurons; averages
    like the parameters. Losses are those of one device, but that eigenvectors of the value 0 are
    any."""
    mesh = {"fsdp": 2, "tensor": 2}
    path = "stack/layers/feed_forward/in/kernel"  # [layers, embed, mlp], over fsdp and tensor

    def specs(**options):
        experiment = build(config_of(options, mesh), jax.devices()[:4])
        single = build(config_of(options, {}), jax.devices()[:1])
        start = first_state(single)
        expected = losses(single, 4, start)
        np.testing.assert_allclose(losses(experiment, 4, start), expected, rtol=1e-3)
        found = {
            jax.tree_util.keystr(key, simple=True, separator="/"): sharding.spec
            for key, sharding in jax.tree.leaves_with_path(experiment.state_sharding.opt_state)
        }
        return {key: tuple(spec) for key, spec in found.items() if key.endswith(path)}

    def config_of(options, mesh):
        config = config_on(mesh)
        for key, value in options.items():
            set_value(config, f"optimizer.{key.replace('__', '.')}", value)
        return config

    found = specs(name="soap", soap__every=2, ema=0.9)
    ends = {key.removesuffix(f"/{path}").split("/")[-1]: spec for key, spec in found.items()}
    assert ends == {
        **dict.fromkeys(("offset", "mu", "nu"), ("stage", "fsdp", "tensor")),
        **dict.fromkeys(("left", "left_basis"), ("stage", "fsdp", None)),
        **dict.fromkeys(("right", "right_basis"), ("stage", "tensor", None)),
    }
    found = specs(name="muon", muon__neuron_b2=0.95, cautious="both")
    assert set(found.values()) == {("stage", "fsdp", "tensor"), ("stage", None, "tensor")}


GOLDEN = (
    "causal decoder",
    "masked encoder",
    "span_corruption encoder_decoder",
    "span_corruption encoder_decoder experts",
    "causal lstm",
)


def test_golden_shardings_of_every_parameter(make_kind):
    """A diff of the golden file names the parameter whose sharding changed."""
    lines = []
    for kind in GOLDEN:
        config = make_kind(kind, parallel__mesh__fsdp=2, parallel__mesh__tensor=2)
        experiment = build(config, jax.devices())
        shapes = flat(experiment.state_shapes.params)
        lines.append(f"# {kind}")
        for path, placed in sorted(flat(experiment.state_sharding.params).items()):
            axes = [str(axis or "-") for axis in placed.spec]
            lines.append(f"{path} {'×'.join(map(str, shapes[path].shape))}: {' '.join(axes)}")
    golden = Path(__file__).with_name("golden_shardings.txt")
    assert "\n".join(lines) + "\n" == golden.read_text()


def test_axis_sizes():
    assert axis_sizes("custom", {"data": -1, "tensor": 2}, 8)["data"] == 4
    assert axis_sizes("fsdp", {"data": 1, "tensor": 2}, 8) == dict.fromkeys(AXES, 1) | {"fsdp": 8}
    for sizes in ({"data": 3}, {"data": 16}, {"data": -1, "tensor": 3}, {"data": 4}):
        with pytest.raises(UserError, match="does not divide 8 devices"):
            axis_sizes("custom", sizes, 8)


def test_a_name_without_a_rule_is_an_error():
    mesh = experiment_on({}).mesh
    with pytest.raises(KeyError, match="no sharding rule for logical axis 'widht'"):
        parameter_sharding(mesh, ("widht",), (4,))
    with pytest.raises(KeyError, match="widht"):
        constrain(np.zeros((4,)), "widht")


def test_a_dimension_that_does_not_divide_is_an_error_or_reported():
    with pytest.raises(UserError, match=r"--config.model.d_model=36 is not divisible by 8"):
        experiment_on({"fsdp": 8}, model__d_model=36, model__head_dim=8)
    with pytest.raises(UserError, match=r"--config.model.n_heads=4 is not divisible by 8 .*tensor"):
        experiment_on({"tensor": 8})
    with pytest.raises(UserError, match=r"--config.data.batch_size=6 is not divisible by 8"):
        experiment_on({"data": 8}, data__batch_size=6)
    experiment = experiment_on({"tensor": 4})
    assert replicated_axes(experiment.mesh, ("vocab", "embed"), (66, 32)) == ["vocab"]
    assert replicated_axes(experiment.mesh, ("vocab", "embed"), (64, 32)) == []
