"""Plan of a training step: memory, FLOPs and traffic of one device, and a lower bound on the time.

The bound is the maximum of three terms, each at its full rate: matrix products at the chip's peak,
main-memory traffic at its bandwidth, communication at the bandwidth of the links it crosses;
networks between and inside slices or hosts are used concurrently. `mfu` at the bound uses the FLOPs
of `lm/accounting/flops.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lm.accounting.flops import model_flops_per_token, tokens_per_row
from lm.experiment import Experiment, build
from lm.hardware import Chip
from lm.models.layer_patterns import global_layers
from lm.tools.planning.collectives import Collective, collectives
from lm.tools.planning.hlo import Module, parse_hlo
from lm.tools.planning.program import (
    OutOfMemory,
    Program,
    batch_shapes,
    compile_step,
    largest_arrays,
)
from lm.tools.planning.topologies import Topology, interconnect
from lm.tools.planning.work import attention_kernel, flops_by_dtype, memory_traffic

Tree = Any
MEMORY_PARTS = ("arguments", "temporaries", "outputs", "code")


@dataclass(frozen=True)
class Memory:
    """Bytes on a device; None if the compiler does not report them.

    Attributes:
        parameters: Parameters.
        optimizer: Optimizer state.
        gradients: Gradients, if fully materialized; part of the temporaries.
        arguments: Arguments of the step: parameters, optimizer state and batch.
        temporaries: Temporaries, including activations.
        outputs: Outputs that do not reuse donated arguments.
        code: Program code.
        host: Bytes offloaded to the host, not part of the total.
        total: Sum of arguments, temporaries, outputs and code.
        needed: Maximum live bytes by the compiler's peak; the total if unknown.
        capacity: Memory of the device.
    """

    parameters: int
    optimizer: int
    gradients: int
    arguments: int
    temporaries: int
    outputs: int | None
    code: int | None
    host: int | None
    total: int
    needed: int
    capacity: int


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind and route.

    Attributes:
        kind: Kind, such as "all-gather".
        axis: Mesh axes, such as "data,fsdp".
        network: "ici" inside a slice or host, "dcn" between them.
        count: Number of collectives per step.
        bytes: Total bytes per step and device.
        asynchronous: Whether they overlap with computation.
        seconds: Total time; None if the bandwidth is unknown.
    """

    kind: str
    axis: str
    network: str
    count: int
    bytes: int
    asynchronous: bool
    seconds: float | None


@dataclass(frozen=True)
class Time:
    """Terms of the bound and the bound itself, in seconds per step."""

    compute: float
    memory: float
    network: float
    bound: float


@dataclass(frozen=True)
class Plan:
    """Plan of a step on a topology; only its memory if it does not compile for lack of memory.

    Attributes:
        config: Keys of SHOWN with their resolved values.
        topology: Name of the topology.
        n_slices: Number of slices.
        n_devices: Number of devices.
        mesh: Sizes of the mesh axes larger than 1.
        parameters: Number of parameters.
        fits: Whether the step fits into the device's memory.
        memory: Memory of a device.
        model_flops: Model FLOPs per device and step.
        compiled_flops: FLOPs of the compiled program per device and step.
        memory_traffic: Main-memory bytes read and written per device and step.
        collectives: Communication, largest first.
        time: Bound on the time; None if the chip's rates are unknown (CPUs), or if the program does
            not fit.
        tokens: Tokens per step on all devices, of sources and targets.
        peak_flops: FLOP/s of the chip.
        attention_kernel: Kernel that the program calls.
        largest: Bytes and description of the largest arrays.
        compile_seconds: Time to lower and compile.
    """

    config: dict[str, Any]
    topology: str
    n_slices: int
    n_devices: int
    mesh: dict[str, int]
    parameters: int
    fits: bool
    memory: Memory
    model_flops: float
    compiled_flops: float | None
    memory_traffic: int | None
    collectives: tuple[Traffic, ...]
    time: Time | None
    tokens: int
    peak_flops: float | None
    attention_kernel: str | None
    largest: tuple[tuple[int, str], ...]
    compile_seconds: float

    @property
    def bottleneck(self) -> str | None:
        """Longest term of the bound."""
        terms = asdict(self.time) if self.time else {}
        terms.pop("bound", None)
        return max(terms, key=lambda name: terms[name]) if terms else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of all devices, at the bound."""
        return self.tokens / self.time.bound if self.time else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization at the bound."""
        if not self.time or not self.peak_flops:
            return None
        return self.model_flops / self.time.bound / self.peak_flops

    def as_json(self) -> dict[str, Any]:
        """Return what `lm plan --json` prints: bytes, FLOPs and seconds per device and step."""
        return {
            "topology": self.topology,
            "slices": self.n_slices,
            "devices": self.n_devices,
            "mesh": self.mesh,
            "config": self.config,
            "parameters": self.parameters,
            "fits": self.fits,
            "memory": asdict(self.memory),
            "flops": {"model": self.model_flops, "compiled": self.compiled_flops},
            "memory_traffic": self.memory_traffic,
            "collectives": [asdict(c) for c in self.collectives],
            "time": asdict(self.time) if self.time else None,
            "bottleneck": self.bottleneck,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "attention_kernel": self.attention_kernel,
            "largest": [{"bytes": size, "array": name} for size, name in self.largest],
            "compile_seconds": round(self.compile_seconds, 2),
        }


SHOWN = (
    "train.remat",
    "train.microbatches",
    "train.loss_chunk",
    "data.batch_size",
    "data.sequence_length",
    "model.dtype",
    "model.attention",
    "optimizer.name",
)


def make_plan(config: ConfigDict, topology: Topology, n_slices: int = 1) -> Plan:
    """Compile the training step of a configuration for a topology and analyze the program.

    Args:
        config: Configuration.
        topology: Devices to compile for.
        n_slices: Number of slices.

    Raises:
        UserError: The configuration does not fit the devices.
    """
    experiment = build(config, topology.devices)
    return plan_of(experiment, compile_step(experiment), topology, n_slices)


def plan_of(
    experiment: Experiment, compiled: Program | OutOfMemory, topology: Topology, n_slices: int = 1
) -> Plan:
    """Analyze the compiled training step of an experiment; see `make_plan`."""
    config, chip = experiment.config, topology.chip
    # The only conditional of a step selects attention with or without a window.
    m = config.model
    taken = global_layers(m, m.n_layers).mean()
    module = parse_hlo(compiled.text, taken) if isinstance(compiled, Program) else None
    memory = _memory(experiment, chip, compiled)
    n_devices, n_steps = len(topology.devices), config.train.steps_per_dispatch
    tokens = config.data.batch_size * tokens_per_row(experiment)
    moved = list_traffic(module, experiment.mesh, topology, n_steps) if module else ()
    each = {d: n / n_steps for d, n in flops_by_dtype(module).items()} if module else None
    done = sum(each.values()) if each is not None else None
    touched = round(memory_traffic(module) / n_steps) if module else None
    return Plan(
        config={key: _value(config, key) for key in SHOWN},
        topology=topology.name,
        n_slices=n_slices,
        n_devices=n_devices,
        mesh={axis: size for axis, size in experiment.mesh.shape.items() if size > 1},
        parameters=sum(leaf.size for leaf in jax.tree.leaves(experiment.param_shapes)),
        fits=module is not None and memory.needed <= memory.capacity,
        memory=memory,
        model_flops=model_flops_per_token(experiment) * tokens / n_devices,
        compiled_flops=done,
        memory_traffic=touched,
        collectives=moved,
        time=_time(chip, each, touched, moved),
        tokens=tokens,
        peak_flops=chip.peak_flops,
        attention_kernel=attention_kernel(module) if module else None,
        largest=largest_arrays(module) if module else compiled.largest,  # type: ignore[union-attr]
        compile_seconds=compiled.seconds,
    )


def on_device(shapes: Tree, shardings: Tree) -> Tree:
    """Return the shapes of one device's shards."""
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(sharding.shard_shape(s.shape), s.dtype),
        shapes,
        shardings,
    )


def bytes_of(shapes: Tree) -> int:
    """Return the bytes of a tree of shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def state_memory(experiment: Experiment) -> tuple[int, int, int, int]:
    """Return bytes per device: parameters, optimizer state, gradients, arguments of a step."""
    state = on_device(experiment.state_shapes, experiment.state_sharding)
    gradients = experiment.steps.split(state.params)[0]
    batch = batch_shapes(experiment)
    batch = on_device(batch, jax.tree.broadcast(experiment.batch_sharding, batch))
    return (
        bytes_of(state.params),
        bytes_of(state.opt_state),
        bytes_of(gradients),
        bytes_of((state, batch)),
    )


def _memory(experiment: Experiment, chip: Chip, compiled: Program | OutOfMemory) -> Memory:
    parameters, optimizer, gradients, arguments = state_memory(experiment)
    of_state = {"parameters": parameters, "optimizer": optimizer, "gradients": gradients}
    if isinstance(compiled, OutOfMemory):
        temporaries = max(compiled.total - arguments, 0)
        return Memory(
            **of_state,
            arguments=arguments,
            temporaries=temporaries,
            outputs=None,
            code=None,
            host=None,
            total=arguments + temporaries,
            needed=arguments + temporaries,
            capacity=compiled.capacity,
        )
    return Memory(
        **of_state,
        **{part: getattr(compiled, part) for part in MEMORY_PARTS},
        host=compiled.host,
        total=compiled.total,
        needed=compiled.needed,
        capacity=chip.memory or 0,
    )


def list_traffic(
    module: Module, mesh: Mesh, topology: Topology, n_steps: int = 1
) -> tuple[Traffic, ...]:
    """List the collectives of a program of `n_steps` steps, with their time per step."""

    def seconds(collective: Collective) -> tuple[str, float | None]:
        crossed = interconnect(topology.chip, collective.route.devices, topology.sides)
        if crossed.bandwidth is None or topology.chip.peak_flops is None:
            return crossed.network, None
        return crossed.network, collective.sent / crossed.spread / crossed.bandwidth / n_steps

    return tuple(
        Traffic(
            kind=c.kind,
            axis=c.route.axis,
            network=seconds(c)[0],
            count=c.count // n_steps,
            bytes=c.bytes // n_steps,
            asynchronous=c.asynchronous,
            seconds=seconds(c)[1],
        )
        for c in collectives(module, mesh)
    )


def _time(
    chip: Chip, done: Mapping[str, float] | None, touched: int | None, moved: Sequence[Traffic]
) -> Time | None:
    if done is None or touched is None or not chip.peak_flops or not chip.memory_bandwidth:
        return None
    terms = (
        sum(n / _peak(chip, dtype) for dtype, n in done.items()),
        touched / chip.memory_bandwidth,
        network_seconds(moved),
    )
    return Time(*terms, bound=max(terms))


def network_seconds(moved: Sequence[Traffic]) -> float:
    """Return the time of collectives; different networks run concurrently."""
    networks: dict[str, float] = {}
    for traffic in moved:
        networks[traffic.network] = networks.get(traffic.network, 0.0) + (traffic.seconds or 0.0)
    return max(networks.values(), default=0.0)


def _peak(chip: Chip, dtype: str) -> float:
    """Return the FLOP/s for products of an HLO dtype."""
    assert chip.peak_flops
    faster = (rate for name, rate in chip.peak_8bit.items() if dtype.startswith(name))
    return next(faster, chip.peak_flops)


def _value(config: ConfigDict, path: str) -> Any:
    section, name = path.split(".")
    return config[section][name]
