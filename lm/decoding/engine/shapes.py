"""Array shapes and programs of a paged engine, for present devices and device descriptions.

Used by the engine for allocation, and by `lm plan --serve` for compilation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Lowered

from lm.decoding.engine.option_table import OptionTable
from lm.decoding.engine.programs import (
    EngineState,
    StateSharding,
    StepRows,
    decode_rows,
    read_chunk,
)
from lm.decoding.engine.sizes import (
    EngineOptions,
    choose_context,
    longest_chunk,
    make_pages,
    pages_per_row,
)
from lm.experiment import Experiment
from lm.models.variables import Params


def allocate_state(experiment: Experiment, options: EngineOptions, n_pages: int) -> EngineState:
    """Allocate the initial state, each shard on its device.

    Args:
        experiment: experiment on a mesh, prepared for decoding.
        options: sizes.
        n_pages: number of pages.
    """
    shapes = state_shapes(experiment, options, n_pages)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)

    def zeros() -> EngineState:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # type: ignore[no-any-return]

    return jax.jit(zeros, out_shardings=shardings)()


def state_shapes(experiment: Experiment, options: EngineOptions, n_pages: int) -> EngineState:
    """Return the shapes and shardings of `allocate_state`."""
    page = partial(make_pages, experiment, n_pages, options.page_size)
    R, T = options.n_rows, choose_context(experiment, options)
    shapes = EngineState(jax.eval_shape(page), _int32(R, T), _int32(R), _bool(R))
    return StateSharding(experiment.mesh).place(shapes, _sharded)


def lower_programs(
    experiment: Experiment, params: Params, options: EngineOptions, n_pages: int
) -> dict[str, Lowered]:
    """Lower the largest programs of an engine: "chunk" (prefill) and "decode" (all rows).

    Args:
        experiment: experiment on a mesh, prepared for decoding.
        params: its parameters, or their shapes with shardings.
        options: sizes.
        n_pages: number of pages.
    """
    model: Any = experiment.model
    R, M, V = options.n_rows, pages_per_row(experiment, options), model.config.vocab_size
    sharding = StateSharding(experiment.mesh)
    before = model, params, state_shapes(experiment, options, n_pages), None
    table = jax.tree.map(_of_array, OptionTable(R, V).on_device)
    number, flag = _int32(), _bool()
    tokens_L = _int32(longest_chunk(experiment, options))
    chunk = (number, _int32(M), tokens_L, number, number, flag, _bool(V))
    rows = StepRows(_int32(R), _int32(R, M), _bool(R), number, _bool(R, V))
    is_prefix, n_columns = experiment.objective.has_prefix, options.steps_per_dispatch
    return {
        "chunk": read_chunk.lower(
            *before, None, table, *chunk, is_prefix=is_prefix, sharding=sharding
        ),
        "decode": decode_rows.lower(*before, table, rows, n_columns=n_columns, sharding=sharding),
    }


def _sharded(x: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _of_array(x: jax.Array) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _int32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _bool(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bool_)
