"""Frozen models next to the trained one: the reference of preference losses, and the teacher.

Their parameters are in the model's own tree, under "frozen/NAME": sharded by the same rules
and saved with them, without gradients or optimizer state. Flax sees them as the
collection "frozen". Under LoRA the reference is the base model itself and takes no extra memory.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from lm.models.variables import FROZEN, MODEL_STATE

Tree = Any

REFERENCE, TEACHER = "reference", "teacher"


def reference_of(model: Any) -> Any:
    """Return a bound model with the parameters that it started from, without dropout.

    During initialization these become a copy of its own parameters; first call what the loss
    calls.

    Args:
        model: the trained model, bound.
    """
    if model.is_initializing():
        model.put_variable(FROZEN, REFERENCE, model.variables["params"])
    variables = model.variables
    params = jax.lax.stop_gradient(variables[FROZEN][REFERENCE])
    state = {MODEL_STATE: variables[MODEL_STATE]} if MODEL_STATE in variables else {}
    return model.clone(parent=None, deterministic=True).bind({"params": params, **state})


def teacher_variables(model: Any, teacher: nn.Module, *inputs: Any) -> dict[str, Any]:
    """Return the variables of a teacher, which are stored with those of its student.

    Args:
        model: the student, bound.
        teacher: module of the teacher.
        *inputs: arguments of its `__call__`; it is initialized together with the student.
    """
    if model.is_initializing():
        variables: Any = teacher.init(model.make_rng("params"), *inputs)
        model.put_variable(FROZEN, TEACHER, variables["params"])
    return {"params": jax.lax.stop_gradient(model.variables[FROZEN][TEACHER])}


def is_frozen(path: str) -> bool:
    """Return whether a path belongs to a frozen model's parameter."""
    return path.startswith(f"{FROZEN}/")


def reference_path(path: str) -> str:
    """Return the path of the reference's copy of a parameter."""
    return f"{FROZEN}/{REFERENCE}/{path}"


def with_reference(params: Tree, reference: Tree) -> Tree:
    """Return nested parameters with others added as the reference, without frozen models."""
    own = {name: leaf for name, leaf in reference.items() if name not in (FROZEN, MODEL_STATE)}
    return {**params, FROZEN: {**params.get(FROZEN, {}), REFERENCE: own}}


def without_frozen(params: Tree) -> Tree:
    """Return parameters without those of frozen models."""
    return {name: leaf for name, leaf in params.items() if name != FROZEN}


def without_reference(params: Tree) -> Tree:
    """Return nested parameters without the reference's copy."""
    beside = {name: x for name, x in params.get(FROZEN, {}).items() if name != REFERENCE}
    own = without_frozen(params)
    return {**own, FROZEN: beside} if beside else own
