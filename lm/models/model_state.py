"""Model state: variables that are neither trained nor carried from batch to batch.

Examples are DeepSeek-V3's router bias and running statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.errors import UserError
from lm.models.variables import MODEL_STATE, flat


class StateVariable:
    """Variable of the collection "model_state", of one module."""

    def __init__(self, module: nn.Module, variable: nn.Variable):
        """Wrap a variable of a module."""
        self._module, self._variable = module, variable

    @property
    def value(self) -> jax.Array:
        """Current value."""
        return self._variable.value

    def update(self, value: jax.Array) -> None:
        """Set the value that the next training step starts from.

        It has no effect during initialization, evaluation or decoding. In training, microbatches
        are processed in order: each starts from the value that the previous one left. So
        the result does not depend on the mesh, as long as `value` is computed from whole arrays of
        the (micro)batch, as is everything outside `shard_map`.
        """
        module = self._module
        if module.is_mutable_collection(MODEL_STATE) and not module.is_initializing():
            self._variable.value = jax.lax.stop_gradient(value)


def model_state(
    module: nn.Module,
    name: str,
    init: Callable[..., jax.Array],
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    dtype: Any = jnp.float32,
) -> StateVariable:
    """Create a variable that is neither trained nor carried from row to row.

    It is sharded by its axes, saved in checkpoints, and used unchanged in evaluation and decoding.

    Args:
        module: module that owns it.
        name: name of the variable in the module.
        init: function of shape and dtype, such as `jnp.zeros`.
        shape: shape without stacked layers.
        axes: logical name of each axis, as for a parameter.
        dtype: dtype of the values.
    """
    if len(axes) != len(shape):
        path = "/".join((*module.path, name))
        raise ValueError(f"model state {path}: shape {shape} and axes {axes} do not match")
    boxed: Any = lambda: nn.Partitioned(init(shape, dtype), axes)  # noqa: E731
    return StateVariable(module, module.variable(MODEL_STATE, name, boxed))


def state_axes(boxed: Any, n_stages: int) -> dict[str, tuple[str, ...]]:
    """Return the logical axes of every variable of model state, by path.

    Args:
        boxed: nested dict of boxed variables.
        n_stages: stages of the pipeline.

    Raises:
        UserError: a variable was not created by `model_state`, or the model runs in a pipeline.
    """
    axes = {}
    for path, box in flat(boxed).items():
        if not isinstance(box, nn.Partitioned):
            raise UserError(
                f"model state {path} has no axes: create it by lm.models.model_state.model_state"
            )
        axes[path] = tuple(map(str, box.names))
    if axes and n_stages > 1:
        raise UserError(
            f"--config.parallel.mesh.stage={n_stages}: a pipeline cannot update model state "
            f"({', '.join(axes)}); use another axis"
        )
    return axes
