"""Low-rank adaptation (Hu et al. 2021): a kernel W becomes W + alpha/rank · A B; A and B train.

The parameters of a model and its adaptation are one tree: {**base, "lora": {…}} with "a" and "b"
where the base has a kernel. They are merged before the model is applied, so any model will do.
Shape letters: N layers, R rank; a kernel is [N, *inputs, *outputs], or without N outside a stack.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lm.errors import UserError
from lm.optim.parameter_groups import LORA, compile_patterns, flat, nested

Tree = Any


def add_lora(params: Tree, options: ConfigDict, rng: jax.Array) -> Tree:
    """Boxed parameters with those of the adaptation of every targeted kernel; rank 0: unchanged.

    A [N, *inputs, R] is uniform in ± inputs^-0.5, as in the authors' code, and B [N, R, *outputs]
    zero: the model starts as it was. `options` is the configuration's section "lora".
    """
    if not options.rank:
        return params
    kernels = {path: box for path, box in flat(params).items() if path.endswith("kernel")}
    targets: dict[str, Any] = {}
    for pattern in compile_patterns("lora.targets", options.targets):
        found = {path: box for path, box in kernels.items() if pattern.search(path)}
        if not found:
            raise UserError(f"--config.lora.targets: {pattern.pattern!r} matches no kernel")
        targets |= found
    adapters = {}
    for key, (path, box) in zip(
        jax.random.split(rng, len(targets)), sorted(targets.items()), strict=True
    ):
        adapters[f"{path}/a"], adapters[f"{path}/b"] = _fresh_pair(box, options.rank, key)
    return {**params, LORA: nested(adapters)}


def merge(params: Tree, alpha: float) -> Tree:
    """The parameters of the model alone: adapted kernels in float32; without "lora", `params`."""
    if LORA not in params:
        return params
    base = flat({name: leaf for name, leaf in params.items() if name != LORA})
    adapters = flat(params[LORA])
    for path in {path.rpartition("/")[0] for path in adapters}:
        a, b = adapters[f"{path}/a"], adapters[f"{path}/b"]
        product = partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
        for _ in range(a.ndim + b.ndim - 2 - base[path].ndim):  # the layers of a stack
            product = jax.vmap(product)
        base[path] = base[path] + alpha / a.shape[-1] * product(a, b)
    return nested(base)


def _fresh_pair(kernel: Any, rank: int, rng: jax.Array) -> tuple[Any, Any]:
    names, shape = kernel.names, kernel.value.shape
    n_stacked = sum(name in ("layers", "experts") for name in names)
    # "head_dim" is the second half of an axis of heads: the other axes are inputs, then outputs.
    n_inputs = 2 if names[n_stacked + 1] == "head_dim" else 1
    middle = n_stacked + n_inputs
    inputs, outputs = shape[n_stacked:middle], shape[middle:]
    bound = prod(inputs) ** -0.5
    a = jax.random.uniform(rng, (*shape[:middle], rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*shape[:n_stacked], rank, *outputs), jnp.float32)
    return (
        nn.Partitioned(a, (*names[:middle], "lora_rank")),
        nn.Partitioned(b, (*names[:n_stacked], "lora_rank", *names[middle:])),
    )
