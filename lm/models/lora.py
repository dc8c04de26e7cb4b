"""Low-rank adaptation (Hu et al. 2021): a kernel W becomes W + alpha/rank · A B; A and B train.

The parameters of a model and its adaptation are one tree: {**base, "lora": {…}} with "a" and "b"
in place of each adapted kernel. They are merged before the model is applied, so any model will do.

Shape letters: N layers and experts, R rank; a kernel is [N, *inputs, *outputs], or without N
outside a stack.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lm.config.patterns import compile_patterns
from lm.errors import UserError
from lm.models.variables import KERNELS, LORA, Kind, Param, flat, nested, param_infos

Tree = Any


def add_lora(params: Tree, options: ConfigDict, rng: jax.Array) -> Tree:
    """Add the low-rank factors of every targeted kernel to boxed parameters.

    A [N, *inputs, R] is uniform in ± inputs^-0.5, as in the authors' code, and B [N, R, *outputs]
    zero: the adapted model starts as the model.

    Args:
        params: boxed parameters.
        options: the configuration's section "lora".
        rng: random key.

    Returns:
        {**params, "lora": …}.

    Raises:
        UserError: a pattern of `lora.targets` matches no kernel, or there is none.
    """
    infos = param_infos(params)
    kernels = [path for path, info in infos.items() if info.role.kind in KERNELS]
    targets: set[str] = set()
    for pattern in compile_patterns("lora.targets", options.targets):
        found = {path for path in kernels if pattern.search(path)}
        if not found:
            raise UserError(f"--config.lora.targets: {pattern.pattern!r} matches no kernel")
        targets |= found
    boxes, adapters = flat(params), {}
    keys = jax.random.split(rng, len(targets))
    for key, path in zip(keys, sorted(targets), strict=True):
        a, b = _new_factors(boxes[path], infos[path].n_stacked, options.rank, key)
        adapters[f"{path}/a"], adapters[f"{path}/b"] = a, b
    return {**params, LORA: nested(adapters)}


def merge_lora(params: Tree, alpha: float) -> Tree:
    """Return the parameters of the model alone, adapted kernels merged in float32."""
    base = flat({name: leaf for name, leaf in params.items() if name != LORA})
    adapters = flat(params[LORA])
    for path in {path.rpartition("/")[0] for path in adapters}:
        a, b = adapters[f"{path}/a"], adapters[f"{path}/b"]
        product = partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
        for _ in range(a.ndim + b.ndim - 2 - base[path].ndim):  # layers and experts
            product = jax.vmap(product)
        base[path] = base[path] + alpha / a.shape[-1] * product(a, b)
    return nested(base)


def _new_factors(kernel: Param, n_stacked: int, rank: int, rng: jax.Array) -> tuple[Param, Param]:
    """Return A and B of a kernel."""
    axes, role, shape = kernel.names, kernel.role, kernel.value.shape
    assert role is not None
    middle = n_stacked + role.inputs
    inputs, outputs = shape[n_stacked:middle], shape[middle:]
    bound = prod(inputs) ** -0.5
    a = jax.random.uniform(rng, (*shape[:middle], rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*shape[:n_stacked], rank, *outputs), jnp.float32)

    def factor(value: jax.Array, axes: tuple, inputs: int, outputs: int) -> Param:
        own = replace(role, kind=Kind.LOW_RANK, part="layers", inputs=inputs, outputs=outputs)
        return Param(value, axes, role=own)

    return (
        factor(a, (*axes[:middle], "lora_rank"), role.inputs, 1),
        factor(b, (*axes[:n_stacked], "lora_rank", *axes[middle:]), 1, role.outputs),
    )
