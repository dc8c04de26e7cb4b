"""Experiment: model, objective, optimizer and mesh of a configuration, wired by `build`.

Training, planning, evaluation, decoding and export all start here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, wraps
from math import prod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped
from ml_collections import ConfigDict

from lm.config import fill_defaults, validate
from lm.config.registries import OBJECTIVES
from lm.config.rules import data_problems
from lm.data.batches import Batches, MakeFeatures, all_in_order, shuffle_endlessly
from lm.data.dataset import Dataset, Store, open_dataset, open_tokenizer
from lm.data.tokenizer import Tokenizer, check_vocabulary
from lm.errors import UserError
from lm.models.attention import AttentionChoice, choose_attention
from lm.models.transformer_config import make_model
from lm.models.variables import MODEL_STATE, ParamInfo, as_variables, flat, nested, with_state
from lm.objectives.objective import Objective
from lm.optim.optimizers import ParamTable, make_optimizer, make_schedule
from lm.parallel.mesh import (
    ROW_AXES,
    axis_sizes,
    batch_sharding,
    make_mesh,
    optimizer_state_sharding,
    parameter_sharding,
    use_mesh,
)
from lm.parallel.pipeline import PipelineSchedule
from lm.train_step import Carry, Steps, TrainState

Tree = Any


def check(config: ConfigDict, platform: str, n_devices: int) -> None:
    """Validate a configuration completely before training or reading data.

    Args:
        config: configuration, resolved or not.
        platform: "cpu", "tpu" or "gpu".
        n_devices: number of devices of the mesh.

    Raises:
        UserError: a key, rule, data source, mesh, attention kernel or objective is invalid; the
            message reports the first problem.
    """
    config = _with_defaults(config, platform)
    for problem in data_problems(config):
        raise UserError(problem)
    sizes = axis_sizes(config.parallel.preset, config.parallel.mesh, n_devices)
    resolve_parallelism(config, platform, sizes)
    # Raises UserError if the sequence length is too short for the objective.
    OBJECTIVES[config.objective.name].from_config(config, None).shapes  # noqa: B018


def resolve(config: ConfigDict, platform: str) -> ConfigDict:
    """Return a copy with all defaults filled in (`fill_defaults`), including the vocabulary size.

    Args:
        config: configuration.
        platform: "cpu", "tpu" or "gpu".
    """
    config = _with_defaults(config, platform)
    _objective(config, None)
    return config


def _with_defaults(config: ConfigDict, platform: str) -> ConfigDict:
    """Return a validated copy with all defaults filled in except the vocabulary size."""
    validate(config)
    return fill_defaults(config, platform)


def _objective(
    config: ConfigDict, tokenizer: Tokenizer | None
) -> tuple[Objective, Tokenizer | None]:
    """Return the objective and the tokenizer, if any; fill in the vocabulary size.

    The tokenizer is opened if it is not given but the vocabulary size depends on it.
    """
    if not config.model.vocab_size and tokenizer is None:
        tokenizer = open_tokenizer(config.data, record_columns(config))
    objective: Objective = OBJECTIVES[config.objective.name].from_config(config, tokenizer)
    # Added tokens need embedding rows even if the imported model has none for them.
    if tokenizer is not None and (tokenizer.kind == "run" or not config.model.vocab_size):
        n_ids = tokenizer.vocab_size + objective.n_extra_ids
        config.model.vocab_size = max(config.model.vocab_size, n_ids)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.model.vocab_size)
    validate(config)
    return objective, tokenizer


@dataclass(frozen=True)
class Experiment:
    """Resolved configuration on a mesh: compiled functions, and shapes and shardings of arrays.

    `tokenizer` is None if it was neither given nor needed for the vocabulary size; batches need it.
    """

    config: ConfigDict
    mesh: Mesh
    pipeline: PipelineSchedule
    model: nn.Module
    steps: Steps
    attention: AttentionChoice
    tokenizer: Tokenizer | None

    @property
    def objective(self) -> Objective:
        return self.steps.objective

    # --- shapes and shardings

    @cached_property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape [B, …] of each array of a global batch."""
        return self.steps.batch_shapes(self.config.data.batch_size)

    @cached_property
    def param_shapes(self) -> Tree:
        """Shape of every parameter, without those of frozen models."""
        return as_variables(nn.meta.unbox(self.steps.boxed_shapes[0]))["params"]

    @property
    def param_infos(self) -> Mapping[str, ParamInfo]:
        """Role and logical axes of every parameter, by path."""
        return self.steps.param_infos

    @cached_property
    def state_shapes(self) -> TrainState:
        """Shapes of the training state."""
        params, carry, model_state = nn.meta.unbox(self.steps.boxed_shapes)
        opt_state = jax.eval_shape(self.steps.init_optimizer, params)
        step: Any = jax.ShapeDtypeStruct((), jnp.int32)
        return TrainState(step, params, opt_state, carry, model_state)

    @cached_property
    def inference_shapes(self) -> Tree:
        """Shapes of parameters and model state, as used by evaluation and decoding."""
        params, _, model_state = nn.meta.unbox(self.steps.boxed_shapes)
        return with_state(params, model_state)

    @cached_property
    def inference_sharding(self) -> Tree:
        """Shardings of `inference_shapes`; does not need the optimizer."""
        axes = {path: info.axes for path, info in self.param_infos.items()}
        if boxed_state := self.steps.boxed_shapes[2]:
            from lm.models.model_state import state_axes

            of_state = state_axes(boxed_state, self.pipeline.stages)
            axes |= {f"{MODEL_STATE}/{path}": names for path, names in of_state.items()}
        leaves = flat(self.inference_shapes).items()
        return nested(
            {path: parameter_sharding(self.mesh, axes[path], x.shape) for path, x in leaves}
        )

    @cached_property
    def state_sharding(self) -> Tree:
        """Shardings of the training state, as a TrainState.

        Optimizer state is sharded like its parameter; counters are replicated.
        """
        shapes = self.state_shapes
        placed = shapes.with_inference_params(self.inference_sharding)
        shape_of = dict(jax.tree.leaves_with_path(shapes.params))
        sharding_of = dict(jax.tree.leaves_with_path(placed.params))

        def optimizer_sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            for end in (path[start:] for start in range(len(path))):
                if end in shape_of:
                    shape = shape_of[end].shape
                    return optimizer_state_sharding(sharding_of[end], shape, leaf.shape)
            return self.replicated

        rest: Any = {
            "step": self.replicated,
            "opt_state": jax.tree_util.tree_map_with_path(optimizer_sharding, shapes.opt_state),
            "carry": self.carry_sharding,
        }
        return replace(placed, **rest)

    @cached_property
    def carry_sharding(self) -> Tree:
        """Sharding of the carry: its rows are sharded like the rows of a batch."""
        rows = NamedSharding(self.mesh, PartitionSpec(ROW_AXES))
        return jax.tree.map(lambda _: rows, nn.meta.unbox(self.steps.boxed_shapes[1]))

    @cached_property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @cached_property
    def batch_sharding(self) -> dict[str, NamedSharding]:
        """Shardings of the [steps, B, …] inputs of `train_steps` and `eval_steps`, by name."""
        shapes = {name: shape.shape for name, shape in self.batch_shapes.items()}
        return batch_sharding(self.mesh, shapes)

    # --- compiled functions

    @cached_property
    def init_state(self) -> Callable[[], TrainState]:
        """Jitted function that returns the sharded initial state."""
        return jax.jit(
            lambda: self.steps.init_state(_zeros(self.batch_shapes)),
            out_shardings=self.state_sharding,
        )

    def init_carry(self, batch_size: int) -> Carry:
        """Return the initial carry for a batch size."""
        shapes = jax.eval_shape(self.steps.init, self.steps.batch_shapes(batch_size))[1]
        return jax.jit(lambda: _zeros(nn.meta.unbox(shapes)), out_shardings=self.carry_sharding)()

    @cached_property
    def train_steps(self) -> Wrapped:
        """Jitted, sharded `Steps.train_steps`; its state argument is donated."""
        train_steps = self.steps.train_steps
        if self.config.train.precision != "none":
            from lm.quantized_training import quantized_train_steps

            train_steps = quantized_train_steps(self.steps, self.config)
        return jax.jit(
            self._on_mesh(train_steps),
            in_shardings=(self.state_sharding, self.batch_sharding),
            out_shardings=(self.state_sharding, self.replicated),
            donate_argnums=0,
            compiler_options=self._compiler_options,
        )

    @cached_property
    def eval_steps(self) -> Wrapped:
        """Jitted, sharded `Steps.eval_steps`."""
        return jax.jit(
            self._on_mesh(self.steps.eval_steps),
            in_shardings=(self.inference_sharding, self.carry_sharding, self.batch_sharding),
            out_shardings=(self.carry_sharding, self.replicated),
        )

    @cached_property
    def predict_steps(self) -> Wrapped:
        """Jitted, sharded `Steps.predict_steps`."""
        return jax.jit(
            self._on_mesh(self.steps.predict_steps),
            in_shardings=(self.inference_sharding, self.batch_sharding),
            out_shardings=self.replicated,
        )

    # --- data

    def training_parts(self, dataset: Dataset) -> Sequence[Any]:
        """Return the examples of each training store."""
        return [self.objective.examples(store, training=True) for store in dataset.train]

    def train_batches(self, dataset: Dataset, first_row: int = 0) -> Batches:
        """Return the training batches; see `Batches` for `first_row`."""
        config, features = self.config, self._features
        parts = self.training_parts(dataset)
        if config.data.order == "contiguous":
            from lm.data.contiguous import contiguous_rows

            examples = contiguous_rows(parts, config.data.batch_size, endless=True)
        elif len(parts) > 1:
            from lm.data.mixture import shuffle_and_mix

            examples = shuffle_and_mix(parts, dataset, config, first_row)
        else:
            examples = shuffle_endlessly(parts[0], config.seed)
        return Batches(examples, features, config.data.batch_size, config.seed, first_row)

    def evaluation_batches(self, stores: Sequence[Store]) -> Batches:
        """Return batches of all examples of the stores in order, each once."""
        config, features = self.config, self._features
        parts: Sequence[Any] = [self.objective.examples(s, training=False) for s in stores]
        batch_size = config.eval.batch_size
        if config.data.order == "contiguous":
            from lm.data.contiguous import contiguous_rows

            examples = contiguous_rows(parts, batch_size, endless=False)
        else:
            examples = all_in_order(parts)
        return Batches(examples, features, batch_size, config.seed)

    @property
    def _features(self) -> MakeFeatures:
        """Function from an example to its features.

        Raises:
            UserError: features may contain ids outside the embedding table.
        """
        if self.tokenizer is None:
            raise ValueError("batches need a tokenizer: build(config, devices, tokenizer)")
        config, n_extra_ids = self.config, self.objective.n_extra_ids
        if n_extra_ids and self.tokenizer.vocab_size + n_extra_ids > config.model.vocab_size:
            raise UserError(
                f"--config.model.vocab_size={config.model.vocab_size} is smaller than the "
                f"tokenizer's {self.tokenizer.vocab_size} and {n_extra_ids} of "
                f"--config.objective.name={config.objective.name}"
            )
        return self.objective.features

    @property
    def _compiler_options(self) -> dict[str, bool | int] | None:
        device = self.mesh.devices.flat[0]
        if device.platform == "cpu":
            return None
        from lm.hardware import compiler_options

        return compiler_options(device)

    def _on_mesh(self, function: Callable) -> Callable:
        @wraps(function)  # shown in profiles
        def on_mesh(*args: Any) -> Any:
            with use_mesh(self.mesh, self.config.parallel.sequence, self.pipeline):
                return function(*args)

        return on_mesh


def build(
    config: ConfigDict, devices: Sequence[jax.Device], tokenizer: Tokenizer | None = None
) -> Experiment:
    """Build the experiment of a configuration, without computing anything.

    Args:
        config: configuration, resolved or not.
        devices: devices of the mesh.
        tokenizer: tokenizer of the data; batches and decoding need it.

    Raises:
        UserError: the configuration is invalid, or does not fit the mesh.
    """
    experiment = build_untraced(config, devices, tokenizer)
    experiment.state_sharding  # noqa: B018
    return experiment


def build_with_data(
    config: ConfigDict, devices: Sequence[jax.Device], progress: bool = False
) -> tuple[Experiment, Dataset]:
    """Open the tokenizer, build the experiment and open the data.

    Args:
        config: configuration.
        devices: devices of the mesh.
        progress: show the progress of tokenization on stderr.

    Raises:
        UserError: configuration, mesh or data are invalid or do not match.
    """
    check(config, devices[0].platform, len(devices))
    columns = record_columns(config)
    tokenizer = open_tokenizer(config.data, columns)
    experiment = build(config, devices, tokenizer)
    experiment._features  # noqa: B018  raises before the data are read
    return experiment, open_dataset(experiment.config.data, columns, progress, tokenizer)


def build_untraced(
    config: ConfigDict, devices: Sequence[jax.Device], tokenizer: Tokenizer | None = None
) -> Experiment:
    """Build an experiment without tracing the model or optimizer."""
    platform = devices[0].platform
    config = _with_defaults(config, platform)
    sizes = axis_sizes(config.parallel.preset, config.parallel.mesh, len(devices))
    capability = getattr(devices[0], "compute_capability", "")
    pipeline, attention = resolve_parallelism(config, platform, sizes, capability)
    objective, tokenizer = _objective(config, tokenizer)
    options, trainable = config.optimizer, None
    schedule = make_schedule(options.learning_rate, config.schedule, config.train.steps)
    if options.freeze or config.lora.rank or config.lora.train or objective.frozen:
        from lm.models.parameter_groups import TrainableMask

        trainable = TrainableMask(options.freeze, config.lora.train)
    width_ratio = config.model.d_model / (config.model.mup_base_width or config.model.d_model)
    table = partial(ParamTable, decay=options.decay, width_ratio=width_ratio)
    steps = Steps(
        model=make_model(config, attention.kernel, attention.across),
        objective=objective,
        make_optimizer=lambda infos: make_optimizer(options, schedule, table(infos), trainable),
        trainable=trainable,
        lora=config.lora,
        schedule=schedule,
        seed=config.seed,
        batch_size=config.data.batch_size,
        microbatches=config.train.microbatches,
    )
    if options.qk_clip:
        from lm.qk_clip import clipped_steps

        steps = clipped_steps(steps, options.qk_clip)
    mesh = make_mesh(sizes, devices)
    return Experiment(config, mesh, pipeline, steps.model, steps, attention, tokenizer)


def resolve_parallelism(
    config: ConfigDict, platform: str, sizes: Mapping[str, int], capability: str = ""
) -> tuple[PipelineSchedule, AttentionChoice]:
    """Return the pipeline schedule and attention kernel of a configuration on a mesh.

    Args:
        config: valid configuration with its defaults filled in.
        platform: "cpu", "tpu" or "gpu".
        sizes: sizes of all mesh axes.
        capability: compute capability of a GPU; "": unknown.

    Raises:
        UserError: the configuration cannot run on the mesh.
    """
    if prod(sizes.values()) > 1:
        from lm.parallel.mesh_rules import mesh_problems

        for problem in mesh_problems(config, sizes):
            raise UserError(problem)
    schedule, stages, options = PipelineSchedule(1, 1, 1), sizes["stage"], config.parallel.pipeline
    if stages > 1:
        schedule = PipelineSchedule(stages, options.microbatches or stages, options.repeats)
    return schedule, choose_attention(config, platform, sizes, capability)


def record_columns(config: ConfigDict) -> tuple[str, ...]:
    """Return the record columns that the objective needs; () if it trains on documents."""
    return OBJECTIVES.entries[config.objective.name].columns


def _zeros(shapes: Tree) -> Tree:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
