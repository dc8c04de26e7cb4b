"""Analytical cost model of a mesh, which selects the candidates that a search compiles.

`least` memory is a lower bound: state, gradients and activations needed in the backward pass.
`likely` memory and the three times are used only for ranking: matrix products, main-memory traffic
and communication, the maximum of which bounds a step as in `plan`. Communication volumes follow
Korthikanti et al. 2022 (§4) and Rajbhandari et al. 2020 (§7); repetition factors and traffic are
fitted to plans of GPT-2 and Llama on v5e and v5p. A search corrects all of them by compiled
candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from math import inf, prod
from typing import Any

import jax

from lm.accounting.flops import model_flops_per_token, tokens_per_row
from lm.config.registries import TRANSFORMERS
from lm.experiment import Experiment
from lm.hardware import Chip
from lm.kernels.elementwise import GATED
from lm.models.moe import expert_width
from lm.models.variables import flat
from lm.parallel.mesh_rules import count_parameter_shards
from lm.parallel.pipeline import PipelineSchedule

# FLOPs repeated by remat, as fractions of the layers' forward pass; offloading transfers are ranked
# as if they were this many additional FLOPs.
REPEATED = {"none": 0.0, "dots": 0.06, "offload_dots": 0.3, "full": 1.0, "offload": 1.2}
# Number of passes of a layer's activations through main memory, for microbatches whose feed-forward
# activations take TRAFFIC_UNIT bytes; with more, less stays on chip between operations.
TRAFFIC = {"none": 34.0, "dots": 21.0, "offload_dots": 21.0, "full": 13.0, "offload": 13.0}
TRAFFIC_UNIT, TRAFFIC_GROWTH = 50e6, 0.35
TRAFFIC_OF_FSDP, TRAFFIC_OF_TENSOR = 9.0, 40.0  # additional passes, of layers and their inputs
MEMORY_OF_ALL_EXPERTS = 2.0  # if XLA multiplies by all experts, from Mixtral 8x7b's plan
TRAFFIC_OF_TICK = 10.0  # passes of a stage's parameters and gradients per pipeline tick
# FLOP/s per byte/s of a typical chip, for chips without published rates.
FLOPS_PER_BYTE = 4000.0

Sizes = Mapping[str, int]


def _one_byte_a_second(*axes: str) -> float:
    return 1.0


@dataclass(frozen=True)
class Settings:
    """Settings of a candidate besides the mesh; `sequence` is sequence parallelism."""

    remat: str
    microbatches: int
    sequence: bool


@dataclass(frozen=True)
class Estimate:
    """Estimate of a candidate.

    Attributes:
        least: Lower bound on bytes per device.
        likely: Likely bytes.
        compute: Seconds per step for matrix products.
        memory: Seconds for main-memory traffic.
        network: Seconds for communication.
    """

    least: int
    likely: int
    compute: float
    memory: float = 0.0
    network: float = 0.0

    @property
    def seconds(self) -> float:
        """Bound on the time of a step."""
        return max(self.compute, self.memory, self.network)


@dataclass(frozen=True)
class CostModel:
    """Cost model of an experiment, built for a single device, on any mesh of a chip."""

    experiment: Experiment
    chip: Chip

    def estimate(
        self,
        sizes: Sizes,
        schedule: PipelineSchedule,
        settings: Settings,
        bandwidth: Callable[..., float] | None = None,
    ) -> Estimate:
        """Estimate memory and time.

        Args:
            sizes: Sizes of the mesh axes.
            schedule: Pipeline schedule.
            settings: Settings besides the mesh.
            bandwidth: Returns bytes/s of a device along some mesh axes; None: those of one link.

        Raises:
            UserError: A parameter is not divisible among the devices.
        """
        parameters = self._parameters(sizes)
        state = int(parameters * (2 + self._optimizer_share))
        kept, likely = self._activations(sizes, settings)
        return Estimate(
            state + kept,
            int((state + likely) * (MEMORY_OF_ALL_EXPERTS if self._idle_experts else 1)),
            self._compute(sizes, schedule, settings),
            self._traffic(sizes, schedule, settings) / (self.chip.memory_bandwidth or inf),
            self._network(sizes, schedule, settings, bandwidth or (lambda *axes: self.chip.link)),
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
        """Return the bytes of the parameters on a device."""
        return self._parameters_by_sizes(tuple(sizes.items()))

    @cached_property
    def _parameters_by_sizes(self) -> Callable[[tuple[tuple[str, int], ...]], int]:
        @cache
        def parameters(sizes: tuple[tuple[str, int], ...]) -> int:
            return sum(
                size // count_parameter_shards(dict(sizes), names, shape)
                for names, shape, size in self._leaves
            )

        return parameters

    def _activations(self, sizes: Sizes, settings: Settings) -> tuple[int, int]:
        """Return lower bound and likely bytes of activations kept for the backward pass.

        For models other than Transformers, only the logits are known.
        """
        model = self.experiment.config.model
        if model.family not in TRANSFORMERS:
            return 0, int(self._logits(sizes, settings))
        layers = model.n_layers / sizes["stage"]
        tokens = self._tokens(sizes) / settings.microbatches * layers * self._item
        width, tensor = kept_width(model, settings.remat, sizes["tensor"]), sizes["tensor"]
        least = width / (tensor if settings.sequence and width == model.d_model else 1)
        # The lower bound assumes one expert per token.
        more_experts = (self._experts_multiplied - 1) * expert_width(model)
        likely = least + (more_experts / tensor if settings.remat == "dots" else 0)
        if settings.remat == "full" and sizes["context"] > 1:  # the output of a ring
            likely += model.n_heads * model.head_dim / tensor
        if settings.remat == "none":
            gated = model.activation in GATED
            inside = kept_width(model, "dots", 1) - model.d_model
            inside += (1 + gated) * (inner_width(model, 1) + more_experts)
            between = 5 * model.d_model / (tensor if settings.sequence else 1)
            likely = 2 * (inside / tensor + between)  # many of them twice, or in float32
        return int(tokens * least), int(tokens * likely + self._logits(sizes, settings))

    def _logits(self, sizes: Sizes, settings: Settings) -> float:
        """Return the bytes of the logits and their gradient, float32."""
        config = self.experiment.config
        length = config.data.sequence_length / sizes["context"]
        shown = min(config.train.loss_chunk or length, length) / length
        tokens = self._tokens(sizes) / sizes["stage"] / settings.microbatches
        return 8 * tokens * shown * config.model.vocab_size / sizes["tensor"]

    # --- time

    def _compute(self, sizes: Sizes, schedule: PipelineSchedule, settings: Settings) -> float:
        flops = self._flops / prod(sizes.values()) / (1 - schedule.bubble)
        repeated = REPEATED[settings.remat] * self._share_of_layers / 3
        return (1 + repeated + self._idle_experts) * flops / self._flops_a_second

    @cached_property
    def _idle_experts(self) -> float:
        """FLOPs of multiplied but unused experts, relative to the model's."""
        model = self.experiment.config.model
        if not self._multiplies_all_experts:
            return 0.0
        infos = self.experiment.param_infos
        shapes = flat(self.experiment.state_shapes.params)
        idle = 1 - model.experts_per_token / model.n_experts
        unused = sum(leaf.size * idle for path, leaf in shapes.items() if infos[path].role.expert)
        return 6.0 * unused * self._all_tokens / self._flops

    @cached_property
    def _share_of_layers(self) -> float:
        """Fraction of FLOPs outside of the logits, which are never recomputed."""
        if not self.experiment.objective.predicts_every_token:
            return 1.0
        model = self.experiment.config.model
        logits = 6.0 * model.d_model * model.vocab_size * self._all_tokens
        return max(1 - logits / self._flops, 0.1)

    @property
    def _experts_multiplied(self) -> int:
        """Number of experts that a token is multiplied with; 1 without experts."""
        model = self.experiment.config.model
        used = model.n_experts if self._multiplies_all_experts else model.experts_per_token
        return used if model.n_experts else 1

    @property
    def _multiplies_all_experts(self) -> bool:
        """True if every token is multiplied with every expert: no capacity, no TPU kernel."""
        model, on_tpu = self.experiment.config.model, self.chip.dimensions > 0
        return bool(model.n_experts and not model.expert_capacity and not on_tpu)

    def _traffic(self, sizes: Sizes, schedule: PipelineSchedule, settings: Settings) -> float:
        """Return the bytes read from and written to main memory: state, logits and layers."""
        model, tensor = self.experiment.config.model, sizes["tensor"]
        gathered = self._parameters({**sizes, "fsdp": 1, "context": 1})
        passes = TRAFFIC_OF_TICK * schedule.iterations if sizes["stage"] > 1 else 1
        uses = settings.microbatches * passes
        moved = 10.0 * self._parameters(sizes) + 5.0 * uses * gathered
        tokens = self._tokens(sizes)
        moved += 20 * tokens / sizes["stage"] * model.vocab_size / tensor
        if model.family not in TRANSFORMERS:
            return moved
        gated = model.activation in GATED
        used = self._experts_multiplied
        inner = inner_width(model, used)
        projected = kept_width(model, "dots", 1) - model.d_model - inner_width(model, 1)
        width = projected / tensor + (1 + gated) * inner / tensor
        width += model.d_model / (tensor if settings.sequence else 1)
        held = tokens / settings.microbatches * inner / tensor * self._item
        growth = max(held / TRAFFIC_UNIT, 0.25) ** TRAFFIC_GROWTH
        passes = TRAFFIC[settings.remat] * growth + TRAFFIC_OF_FSDP * (sizes["fsdp"] > 1)
        more = TRAFFIC_OF_TENSOR * model.d_model * (tensor > 1)
        return moved + tokens * model.n_layers / sizes["stage"] * self._item * (
            passes * width + more
        )

    def _network(
        self,
        sizes: Sizes,
        schedule: PipelineSchedule,
        settings: Settings,
        bandwidth: Callable[..., float],
    ) -> float:
        """Return the seconds of communication: layers, parameter shards and gradients."""
        if not self.chip.peak_flops:
            bandwidth = _one_byte_a_second
        model, item = self.experiment.config.model, self._item
        tokens = self._tokens(sizes) * item
        layers = model.n_layers / sizes["stage"]
        part = {axis: (size - 1) / size for axis, size in sizes.items()}  # fraction sent on a ring
        seconds = 0.0
        # All-gathers of parameters, reduce-scatters of gradients.
        if shards := [axis for axis in ("fsdp", "context") if sizes[axis] > 1]:
            gathered = self._parameters({**sizes, "fsdp": 1, "context": 1})
            n = prod(sizes[axis] for axis in shards)
            sent = 3.5 * settings.microbatches * gathered * (n - 1) / n
            seconds += sent / bandwidth(*shards)
        copies = [axis for axis in ("slice", "data") if sizes[axis] > 1]
        if copies:  # all-reduces of gradients, in every microbatch
            n = prod(sizes[axis] for axis in copies)
            iterations = schedule.iterations if sizes["stage"] > 1 else 1
            times = settings.microbatches * iterations
            sent = 2 * times * self._parameters(sizes) * (n - 1) / n
            seconds += sent / bandwidth(*copies)
        if sizes["tensor"] > 1:  # two all-reduces forward, two backward, one recomputed; float32
            sums = 4 + (settings.remat != "none")
            sent = 2 * sums * 4 / item * tokens * model.d_model * layers * part["tensor"]
            seconds += sent / bandwidth("tensor")
        if sizes["context"] > 1:  # keys and values around the ring; with gradients when backward
            pairs = 2 * model.n_kv_heads * model.head_dim / sizes["tensor"]
            sent = 3 * tokens * pairs * (sizes["context"] - 1) * layers
            seconds += sent / bandwidth("context")
        if sizes["expert"] > 1:
            # With a capacity: two all-to-alls forward, two backward; else all tokens on each.
            to_all = 6 * (sizes["expert"] - 1)
            sums = 4 * model.experts_per_token if model.expert_capacity else to_all
            seconds += sums * tokens * model.d_model * layers / bandwidth("expert")
        if sizes["stage"] > 1:
            seconds += 2 * tokens * model.d_model / bandwidth("stage")
        return seconds

    @cached_property
    def _flops(self) -> float:
        """Model FLOPs of a step on all devices."""
        tokens = self.experiment.config.data.batch_size * tokens_per_row(self.experiment)
        return model_flops_per_token(self.experiment) * tokens

    @property
    def _flops_a_second(self) -> float:
        return self.chip.peak_flops or FLOPS_PER_BYTE

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
    """Return the minimum number of activations per token that a device keeps of a layer.

    The input of the layer and, unless recomputed, the results of its matrix products.

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
    return model.d_model + (projected + inner_width(model, 1)) / tensor


def inner_width(model: Any, n_experts: int) -> int:
    """Return the hidden units of a feed-forward layer that a token uses, excluding gates.

    Args:
        model: Model section of the configuration.
        n_experts: Routed experts that a token is multiplied with.
    """
    if not model.n_experts:
        return model.d_ff
    return n_experts * expert_width(model) + model.shared_expert_d_ff
