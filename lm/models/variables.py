"""Variables of a model: parameters with roles, model state, and reported values.

A module creates a parameter by `param`, which takes the logical names of its axes (sharded by
`lm/parallel/mesh.py`) and its role. Code that treats parameters differently (weight decay, muP,
Muon, low-rank adaptation, layer-wise decay, parameter counts, FLOPs) reads the role, never the
path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from lm.errors import UserError

Params = Any
Initializer = Callable[..., jax.Array]
Stream = Literal["frames", "source", "target", "predicted", "text"]
Part = Literal["input", "layers", "body", "output", "pretraining", "task"]


# --- trees by path

LORA = "lora"  # key of the low-rank factors


def flat(params: Any) -> dict[str, Any]:
    """Flatten nested parameters to a dict by path."""
    return flatten_dict(params, sep="/")


def nested(params: Mapping[str, Any]) -> Any:
    """Nest a dict by path, which undoes `flat`."""
    return unflatten_dict(dict(params), sep="/")


# --- roles


class Kind(StrEnum):
    """Kind of a parameter, by what it computes."""

    MATRIX = "matrix"  # from features to features: in muP both dimensions grow with the width
    HEAD = "head"  # from features to a fixed number of scores (vocabulary, classes)
    ROUTER = "router"  # from features to scores of experts
    EMBEDDING = "embedding"  # look-up table of tokens, positions or token types
    POSITION_BIAS = "position bias"  # table of attention biases by distance (T5)
    NORM = "norm"  # scale of a normalization
    BIAS = "bias"
    SCALE = "scale"  # scale of an 8-bit kernel
    LOW_RANK = "low rank"  # factor A or B of low-rank adaptation


# Parameters that a linear map multiplies by.
KERNELS = frozenset({Kind.MATRIX, Kind.HEAD, Kind.ROUTER})


@dataclass(frozen=True)
class Role:
    """Role of a parameter: all of its properties besides shape and axes.

    Attributes:
        kind: what it computes.
        stream: tokens of an example that pass through it: those of the "source" or the "target",
            the "predicted" ones, one vector for the whole "text", or the "frames" of audio.
        part: part of the model that it belongs to: "input" (embeddings and their norms),
            "layers" (blocks of a stack, and its norm), "body" (matrices outside of blocks: AdamW
            under Muon),
            "output" (an output layer that is counted with the embeddings; Kaplan et al. 2020,
            §2.1), "pretraining" (heads that published counts of BERT leave out), or "task"
            (classifiers and their pooler).
        expert: belongs to one of several experts, of which a token uses a few.
        tied: an embedding that is also the output matrix.
        inputs: number of axes that are summed over when it is applied.
        outputs: number of axes of the result. Leading axes beyond these two are stacked: layers,
            experts.
    """

    kind: Kind
    stream: Stream = "target"
    part: Part = "layers"
    expert: bool = False
    tied: bool = False
    inputs: int = 0
    outputs: int = 1

    def bias(self) -> Role:
        """Return the role of the bias that is added to the result."""
        return replace(self, kind=Kind.BIAS, inputs=0)


@dataclass(frozen=True)
class ParamInfo:
    """Role and logical axis names of one parameter."""

    role: Role
    axes: tuple[str, ...]

    @property
    def n_stacked(self) -> int:
        """Number of leading axes that stack parameters: layers, experts."""
        return len(self.axes) - self.role.inputs - self.role.outputs


class Param(nn.Partitioned):
    """Box of a parameter: its value, logical axis names and role."""

    role: Role | None = flax.struct.field(default=None, pytree_node=False)


def param(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    role: Role,
) -> jax.Array:
    """Create a float32 parameter of a module.

    Args:
        module: module that owns it.
        name: name of the parameter in the module.
        init: initializer, called with key, shape and dtype.
        shape: shape without stacked layers.
        axes: logical name of each axis; `lm/parallel/mesh.py` has the known ones.
        role: role of the parameter.

    Returns:
        Its value.

    Raises:
        ValueError: `role` is not a Role, or shape, axes and role do not match.
    """
    path = "/".join((*module.path, name))
    if not isinstance(role, Role):
        raise ValueError(f"parameter {path} has no role: pass a Role, not {role!r}")
    if len(axes) != len(shape) or len(shape) < role.inputs + role.outputs:
        raise ValueError(f"parameter {path}: shape {shape}, axes {axes} and {role} do not match")
    boxed: Any = lambda key: Param(init(key, shape, jnp.float32), axes, role=role)  # noqa: E731
    return module.param(name, boxed)


def param_infos(boxed: Any) -> dict[str, ParamInfo]:
    """Return role and axes of every parameter, by path.

    Args:
        boxed: nested dict of boxed parameters, as `nn.Module.init` returns it.

    Raises:
        UserError: a parameter was not created by `param`.
    """
    infos = {}
    for path, box in flat(boxed).items():
        if not isinstance(box, Param) or box.role is None:
            raise UserError(
                f"parameter {path} has no role: create it by lm.models.variables.param, "
                "with its axes and its role"
            )
        infos[path] = ParamInfo(box.role, tuple(map(str, box.names)))
    return infos


# --- model state

MODEL_STATE = "model_state"  # collection of variables that `lm/models/model_state.py` creates
FROZEN = "frozen"  # parameters of models next to the trained one (`lm/models/frozen.py`)


def with_state(params: Any, state: Any, name: str = MODEL_STATE) -> Any:
    """Return parameters with another collection added under its name, if it is not empty."""
    return {**params, name: state} if state else params


def as_variables(params: Any) -> dict[str, Any]:
    """Return the variables for `Module.apply`, from parameters that may include model state.

    Args:
        params: tree from `with_state`, as passed to evaluation and decoding.
    """
    beside = {name: params[name] for name in (MODEL_STATE, FROZEN) if name in params}
    return {"params": {name: x for name, x in params.items() if name not in beside}, **beside}


# --- values that layers report

LOSSES, METRICS = "losses", "metrics"
# Collections with one number per row, added up by the training step
# (`lm/objectives/layer_losses.py`); not computed unless they are collected, as in decoding.
COLLECTIONS = (LOSSES, METRICS)


def add_loss(module: nn.Module, name: str, loss_B: jax.Array) -> None:
    """Add to the loss of each row; losses of several layers are summed."""
    module.sow(LOSSES, name, loss_B)


def add_metric(module: nn.Module, name: str, value_B: jax.Array) -> None:
    """Report a metric of each row; it is averaged over layers."""
    module.sow(METRICS, name, value_B)
