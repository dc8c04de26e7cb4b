"""Plan of decoding: memory and traffic of one step, which continues every row by a token.

A step must read every weight, and the keys and values of all tokens so far; the bound is these
bytes at memory bandwidth, reported next to the traffic of the compiled program.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from lm.decoding.controls import Controls
from lm.decoding.prompts import generates_text, is_encoder_decoder
from lm.decoding.sampling import Rows, Sampling, State, next_token
from lm.decoding.weights import prepare
from lm.errors import UserError
from lm.experiment import build
from lm.tools.planning.hlo import parse_hlo
from lm.tools.planning.program import compile_untuned
from lm.tools.planning.serve_work import shard_bytes
from lm.tools.planning.topologies import Topology
from lm.tools.planning.work import memory_traffic


@dataclass(frozen=True)
class DecodePlan:
    """Bytes and time of a step on one device.

    Attributes:
        topology: name of the devices.
        n_devices: number of devices.
        rows: batch size.
        cached: cache slots per row.
        weights: bytes of the weights.
        cache: bytes of the cache.
        needed: maximum live bytes: arguments and temporaries.
        capacity: memory of the device.
        traffic: bytes that the compiled step reads and writes.
        bandwidth: bytes/s of the memory; None if unknown.
    """

    topology: str
    n_devices: int
    rows: int
    cached: int
    weights: int
    cache: int
    needed: int
    capacity: int
    traffic: int
    bandwidth: float | None

    @property
    def seconds(self) -> float | None:
        """Minimum time of a step: its traffic, or what it must read, at full bandwidth."""
        moved = max(self.traffic, self.weights + self.cache)
        return moved / self.bandwidth if self.bandwidth else None

    def as_json(self) -> dict[str, Any]:
        """Return all values."""
        bound = self.weights + self.cache
        rate = self.rows / self.seconds if self.seconds else None
        derived = {"bound": bound, "traffic_over_bound": self.traffic / bound}
        return asdict(self) | derived | {"seconds": self.seconds, "tokens_per_second": rate}


def plan_decoding(config: ConfigDict, topology: Topology) -> DecodePlan:
    """Compile a greedy step of `decode.batch_size` rows and analyze the program.

    The cache has `data.sequence_length` slots per row.

    Args:
        config: configuration.
        topology: devices to compile for.

    Raises:
        UserError: the model does not continue prompts.
    """
    experiment = build(config, topology.devices)
    if is_encoder_decoder(experiment.model) or not generates_text(experiment):
        raise UserError("--decode plans models that continue a prompt")
    shapes = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        experiment.inference_shapes,
        experiment.inference_sharding,
    )
    made, params = prepare(experiment, shapes)
    B, S = experiment.config.decode.batch_size, experiment.config.data.sequence_length
    everywhere = NamedSharding(experiment.mesh, PartitionSpec())

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    key = jax.eval_shape(partial(jax.random.key, 0))
    rows = Rows(array(key.dtype), *(array(jnp.int32, B) for _ in range(3)))
    cache: Any = jax.eval_shape(partial(made.model.apply, {}, B, S, method="empty_cache"))
    cache = jax.tree.map(lambda x: array(x.dtype, *x.shape), cache)
    state = State(array(jnp.int32, B, S), array(jnp.int32), array(jnp.bool_, B), cache)
    step = jax.jit(
        partial(next_token, made.model, Sampling(0.0), Controls()), donate_argnames="state"
    )
    compiled = compile_untuned(step.lower(params=params, rows=rows, state=state))
    memory = compiled.memory_analysis()
    assert memory is not None
    return DecodePlan(
        topology=topology.name,
        n_devices=len(topology.devices),
        rows=B,
        cached=S,
        weights=shard_bytes(params),
        cache=shard_bytes(cache),
        needed=memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        capacity=topology.chip.memory or 0,
        traffic=round(memory_traffic(parse_hlo(compiled.as_text() or ""))),
        bandwidth=topology.chip.memory_bandwidth,
    )


def decode_plan_text(plan: DecodePlan) -> str:
    """Format a plan for a terminal."""
    figures = plan.as_json()
    lines = [
        f"{plan.topology}: {plan.rows} rows, cache for {plan.cached} tokens each",
        f"memory a device    {plan.needed / 1e9:.2f} of {plan.capacity / 1e9:.2f} GB: "
        f"weights {plan.weights / 1e9:.2f}, cache {plan.cache / 1e9:.2f}",
        f"traffic a step     {plan.traffic / 1e9:.3f} GB, "
        f"{figures['traffic_over_bound']:.2f} times weights and cache; "
        f"{plan.traffic / plan.rows / 1e6:.1f} MB per token",
    ]
    if plan.seconds:
        lines.append(
            f"time a step        {1e3 * plan.seconds:.3f} ms at least: "
            f"{figures['tokens_per_second']:,.0f} tokens/s"
        )
    return "\n".join(lines)
