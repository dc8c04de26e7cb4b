"""`build(config, devices)`: the one place that wires model, objective, optimizer and mesh.

Training, planning, evaluation, decoding and export all start here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped
from ml_collections import ConfigDict

from lm.config import validate
from lm.data.batches import Batches, evaluation_examples, training_examples
from lm.data.dataset import Dataset, open_tokenizer
from lm.errors import UserError
from lm.models.config import TransformerConfig
from lm.models.decoder import Decoder
from lm.objectives.registry import make_objective
from lm.optim.optimizers import make_optimizer
from lm.optim.schedules import make_schedule
from lm.parallel import rules
from lm.parallel.mesh import axis_sizes, make_mesh
from lm.steps import Steps, TrainState

Tree = Any


def resolve(config: ConfigDict, platform: str) -> ConfigDict:
    """A copy of the configuration with every 0 and "auto" that stands for a default filled in.

    `platform` is the devices' ("cpu", "tpu", "gpu"). May open the tokenizer to learn its size.
    """
    config = config.copy_and_resolve_references()
    validate(config)
    model = config.model
    model.vocab_size = model.vocab_size or open_tokenizer(config.data).vocab_size
    model.n_kv_heads = model.n_kv_heads or model.n_heads
    model.head_dim = model.head_dim or model.d_model // model.n_heads
    model.d_ff = model.d_ff or 4 * model.d_model
    model.max_length = model.max_length or config.data.sequence_length
    config.data.stride = config.data.stride or config.data.sequence_length
    config.eval.batch_size = config.eval.batch_size or config.data.batch_size
    if model.dtype == "auto":
        model.dtype = "float32" if platform == "cpu" else "bfloat16"
    if model.attention == "auto":
        tiled = platform == "cpu" and not model.attention_dropout
        model.attention = "tiled" if tiled else "xla"
    validate(config)
    return config


@dataclass(frozen=True)
class Experiment:
    """One resolved configuration on one mesh: its functions, and where their arrays lie."""

    config: ConfigDict
    mesh: Mesh
    model: Decoder
    steps: Steps

    # --- shapes and shardings

    @cached_property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape of each array of a global batch, [B, …]."""
        length = self.config.data.sequence_length
        ids = np.broadcast_to(np.int32(0), length + 1)  # takes no memory, whatever the length
        example = {
            **dict.fromkeys(("tokens", "segment_ids", "positions"), ids),
            "weights": np.broadcast_to(np.float32(0), length),
        }
        features = self.steps.objective.features(example, np.random.default_rng(0))
        return {
            name: jax.ShapeDtypeStruct((self.config.data.batch_size, *x.shape), x.dtype)
            for name, x in features.items()
        }

    @cached_property
    def param_names(self) -> Tree:
        """The logical axis names of every parameter."""
        boxed = jax.eval_shape(lambda: self.steps.init_params(self._example_inputs))
        return nn.get_partition_spec(boxed)

    @cached_property
    def state_shapes(self) -> TrainState:
        return jax.eval_shape(lambda: self.steps.init_state(self._example_inputs))

    @cached_property
    def state_sharding(self) -> Tree:
        """A TrainState of shardings.

        Optimizer state lies like its parameter; statistics of other shapes (factored ones,
        counters) are replicated.
        """
        shapes = self.state_shapes
        of_params = jax.tree.map(
            lambda shape, names: rules.parameter_sharding(self.mesh, names, shape.shape),
            shapes.params,
            self.param_names,
        )
        by_path = {
            path: (shape.shape, sharding)
            for (path, shape), sharding in zip(
                jax.tree.leaves_with_path(shapes.params), jax.tree.leaves(of_params), strict=True
            )
        }

        def of_statistic(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            for start in range(len(path)):
                shape, sharding = by_path.get(path[start:], (None, self.replicated))
                if shape == leaf.shape:
                    return sharding
            return self.replicated

        of_optimizer = jax.tree_util.tree_map_with_path(of_statistic, shapes.opt_state)
        placed: Any = {"step": self.replicated, "params": of_params, "opt_state": of_optimizer}
        return replace(shapes, **placed)

    @cached_property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @cached_property
    def batch_sharding(self) -> NamedSharding:
        """Of the [steps, B, …] arrays that `train_steps` and `eval_steps` take."""
        return NamedSharding(self.mesh, PartitionSpec(None, rules.BATCH_AXES))

    # --- compiled functions

    @cached_property
    def init_state(self) -> Callable[[], TrainState]:
        """The state before the first step, created where it will lie."""
        return jax.jit(
            lambda: self.steps.init_state(self._example_inputs), out_shardings=self.state_sharding
        )

    @cached_property
    def train_steps(self) -> Wrapped:
        """`Steps.train_steps`, sharded; the state given to it is donated."""
        return jax.jit(
            self._on_mesh(self.steps.train_steps),
            in_shardings=(self.state_sharding, self.batch_sharding),
            out_shardings=(self.state_sharding, self.replicated),
            donate_argnums=0,
        )

    @cached_property
    def eval_steps(self) -> Wrapped:
        """`Steps.eval_steps`, sharded."""
        return jax.jit(
            self._on_mesh(self.steps.eval_steps),
            in_shardings=(self.state_sharding.params, self.batch_sharding),
            out_shardings=self.replicated,
        )

    # --- data

    def train_batches(self, dataset: Dataset) -> Batches:
        data = self.config.data
        examples = training_examples(dataset.train, dataset.weights, data, self.config.seed)
        return Batches(examples, self.steps.objective.features, data.batch_size, self.config.seed)

    def validation_batches(self, dataset: Dataset) -> Batches:
        examples = evaluation_examples(dataset.validation, self.config.data)
        batch_size = self.config.eval.batch_size
        return Batches(examples, self.steps.objective.features, batch_size, self.config.seed)

    @property
    def _example_inputs(self) -> tuple[jax.Array]:
        return (jnp.zeros((1, self.config.data.sequence_length), jnp.int32),)

    def _on_mesh(self, function: Callable) -> Callable:
        def on_mesh(*args: Any) -> Any:
            with rules.activations_on(self.mesh):
                return function(*args)

        return on_mesh


def build(config: ConfigDict, devices: Sequence[jax.Device]) -> Experiment:
    """Wire the experiment that `config` describes on `devices`; nothing is computed yet."""
    config = resolve(config, devices[0].platform)
    sizes = axis_sizes(config.parallel.preset, config.parallel.mesh, len(devices))
    _check_batch(config, sizes)
    if config.model.n_heads % sizes["tensor"]:
        raise UserError(
            f"config.model.n_heads={config.model.n_heads} is not divisible by "
            f"config.parallel.mesh.tensor={sizes['tensor']}"
        )
    model = Decoder(transformer_config(config))
    schedule = make_schedule(config.optimizer.learning_rate, config.schedule, config.train.steps)
    steps = Steps(
        model=model,
        objective=make_objective(config),
        optimizer=make_optimizer(config.optimizer, schedule),
        schedule=schedule,
        seed=config.seed,
        microbatches=config.train.microbatches,
    )
    experiment = Experiment(config, make_mesh(sizes, devices), model, steps)
    experiment.state_sharding  # noqa: B018  a mesh that does not fit fails here, not in mid-run
    return experiment


def transformer_config(config: ConfigDict) -> TransformerConfig:
    """The Transformer that a resolved configuration describes."""
    model = dict(config.model) | {
        "dtype": jnp.dtype(config.model.dtype),
        "remat": config.train.remat,
        "scan_unroll": config.train.scan_unroll,
    }
    return TransformerConfig(
        **{field.name: model[field.name] for field in fields(TransformerConfig)}
    )


def _check_batch(config: ConfigDict, sizes: dict[str, int]) -> None:
    shards = sizes["slice"] * sizes["data"] * sizes["fsdp"]
    parts = shards * config.train.microbatches
    if config.data.batch_size % parts:
        raise UserError(
            f"config.data.batch_size={config.data.batch_size} is not divisible by {parts} "
            f"({shards} data-parallel devices × {config.train.microbatches} microbatches)"
        )
    if config.eval.batch_size % shards:
        raise UserError(
            f"config.eval.batch_size={config.eval.batch_size} is not divisible by {shards} "
            "data-parallel devices"
        )
