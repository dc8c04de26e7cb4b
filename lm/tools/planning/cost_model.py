"""Analytical cost model of a mesh, which decides what candidates of a search are compiled.

`least` memory is a lower bound: state, gradients and the activations that the backward pass needs.
`likely` memory and `seconds` only rank. Communication volumes follow Korthikanti et al. 2022 (§4)
and Rajbhandari et al. 2020 (§7); communication is assumed to overlap with computation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import jax

from lm.accounting.flops import model_flops_per_token, tokens_per_row
from lm.config.rules import TRANSFORMERS
from lm.experiment import Experiment
from lm.hardware import Chip
from lm.models.variables import flat
from lm.parallel.mesh import count_parameter_shards
from lm.parallel.pipeline import PipelineSchedule

# FLOPs of a step relative to a step without remat; the transfers of offloading are ranked as if
# they were so many more FLOPs.
REMAT_COST = {"none": 1.0, "dots": 1.05, "offload_dots": 1.15, "full": 4 / 3, "offload": 1.4}
# Ratio of FLOP/s to bytes/s of a typical chip, for chips without published rates.
FLOPS_PER_BYTE = 4000.0

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Settings:
    """Settings of a candidate beside the mesh: `sequence` is sequence parallelism."""

    remat: str
    microbatches: int
    sequence: bool


@dataclass(frozen=True)
class Estimate:
    """Estimate of a candidate: least and likely bytes of a device, seconds a step."""

    least: int
    likely: int
    seconds: float


@dataclass(frozen=True)
class CostModel:
    """Cost model of one experiment, built for a single device, on any mesh of a chip."""

    experiment: Experiment
    chip: Chip

    def estimate(self, sizes: Sizes, schedule: PipelineSchedule, settings: Settings) -> Estimate:
        """Estimate memory and time.

        Args:
            sizes: Sizes of the mesh axes.
            schedule: Pipeline schedule.
            settings: Settings beside the mesh.

        Raises:
            UserError: A parameter is not divisible among the devices.
        """
        parameters = self._parameters(sizes)
        state = int(parameters * (2 + self._optimizer_share))
        kept, likely = self._activations(sizes, settings)
        return Estimate(
            state + kept,
            state + likely,
            max(self._compute(sizes, schedule, settings), self._network(sizes, settings)),
        )

    # --- memory

    @cached_property
    def _leaves(self) -> list[tuple[tuple[str, ...], tuple[int, ...], int]]:
        """Logical axes, shape and bytes of every parameter."""
        infos = self.experiment.param_infos
        shapes = flat(self.experiment.state_shapes.params)
        return [
            (infos[path].axes, leaf.shape, leaf.size * leaf.dtype.itemsize)
            for path, leaf in shapes.items()
        ]

    @cached_property
    def _optimizer_share(self) -> float:
        """Ratio of the bytes of the optimizer state to those of the parameters."""
        state = jax.tree.leaves(self.experiment.state_shapes.opt_state)
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in state)
        return held / sum(size for _, _, size in self._leaves)

    def _parameters(self, sizes: Sizes) -> int:
        return sum(
            size // count_parameter_shards(sizes, names, shape)
            for names, shape, size in self._leaves
        )

    def _activations(self, sizes: Sizes, settings: Settings) -> tuple[int, int]:
        """Return least and likely bytes of activations kept for the backward pass.

        Of models other than Transformers only the logits are known.
        """
        model = self.experiment.config.model
        if model.family not in TRANSFORMERS:
            return 0, int(self._logits(sizes, settings))
        layers = model.n_layers / sizes["stage"]
        tokens = self._tokens(sizes) / settings.microbatches * layers * self._item
        width, tensor = kept_width(model, settings.remat, sizes["tensor"]), sizes["tensor"]
        least = width / (tensor if settings.sequence and width == model.d_model else 1)
        likely = least
        if settings.remat == "none":
            gated = model.activation in ("swiglu", "geglu")
            inside = kept_width(model, "dots", 1) - model.d_model + (1 + gated) * model.d_ff
            between = 5 * model.d_model / (tensor if settings.sequence else 1)
            likely = inside / tensor + between
        return int(tokens * least), int(tokens * likely + self._logits(sizes, settings))

    def _logits(self, sizes: Sizes, settings: Settings) -> float:
        """Return the bytes of the logits and their gradient, float32."""
        config = self.experiment.config
        length = config.data.sequence_length
        shown = min(config.train.loss_chunk or length, length) / length
        tokens = self._tokens(sizes) / sizes["stage"] / settings.microbatches
        return 8 * tokens * shown * config.model.vocab_size / sizes["tensor"]

    # --- time

    def _compute(self, sizes: Sizes, schedule: PipelineSchedule, settings: Settings) -> float:
        flops = self._flops / prod(sizes.values())
        return REMAT_COST[settings.remat] * flops / (1 - schedule.bubble) / self._flops_a_second

    def _network(self, sizes: Sizes, settings: Settings) -> float:
        """Return the seconds of communication: layers, parameter shards and gradients."""
        model, item = self.experiment.config.model, self._item
        tokens = self._tokens(sizes) * item
        layers = model.n_layers / sizes["stage"]
        held = {**sizes, "fsdp": 1}
        gathered = self._parameters(held) / 4 * item
        sent = 0.0
        if sizes["fsdp"] > 1:  # two all-gathers of parameters, one reduce-scatter of gradients
            sent += 3 * settings.microbatches * gathered
        copies = sizes["data"] * sizes["slice"] * (1 if sizes["expert"] == 1 else sizes["expert"])
        if copies > 1:
            sent += 2 * self._parameters(sizes)
        if sizes["tensor"] > 1:  # two all-reduces forward, two backward, two when recomputed
            sums = 4 + 2 * (settings.remat in ("full", "offload"))
            sent += 2 * sums * tokens * model.d_model * layers
        if sizes["context"] > 1:  # keys and values around the ring; with gradients when backward
            pairs = 2 * model.n_kv_heads * model.head_dim / sizes["tensor"]
            sent += 3 * tokens * pairs * (sizes["context"] - 1) * layers
        if sizes["expert"] > 1:  # two all-to-alls forward, two backward
            sent += 4 * tokens * model.d_model * model.experts_per_token * layers
        if sizes["stage"] > 1:
            sent += 2 * tokens * model.d_model
        return sent / self._bytes_a_second

    @cached_property
    def _flops(self) -> float:
        """Model FLOPs of a step on all devices."""
        tokens = self.experiment.config.data.batch_size * tokens_per_row(self.experiment)
        return model_flops_per_token(self.experiment) * tokens

    @property
    def _flops_a_second(self) -> float:
        return self.chip.peak_flops or FLOPS_PER_BYTE

    @property
    def _bytes_a_second(self) -> float:
        return self.chip.link if self.chip.peak_flops else 1.0

    # --- memory and time

    @property
    def _item(self) -> int:
        return 2 if self.experiment.config.model.dtype == "bfloat16" else 4

    @property
    def _all_tokens(self) -> int:
        data = self.experiment.config.data
        return data.batch_size * data.sequence_length

    def _tokens(self, sizes: Sizes) -> float:
        """Return the number of tokens that pass through a layer on one device."""
        axes = ("slice", "data", "fsdp", "expert", "context")
        return self._all_tokens / prod(sizes[axis] for axis in axes)


def kept_width(model: Any, remat: str, tensor: int) -> float:
    """Return the least number of activations a token that a device keeps of a layer.

    The input of the layer and, unless they are recomputed, the results of its matrix products.

    Args:
        model: Model section of the configuration.
        remat: Rematerialization.
        tensor: Size of the tensor axis, which divides the results.
    """
    if remat == "offload":
        return 0
    if remat in ("full", "offload_dots"):
        return model.d_model
    projected = 2 * model.n_heads * model.head_dim + 2 * model.n_kv_heads * model.head_dim
    return model.d_model + (projected + model.d_ff) / tensor
