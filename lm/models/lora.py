"""Low-rank adaptation (Hu et al. 2021): a kernel W becomes W + alpha/rank · A B; A and B train.

The parameters of a model and its adaptation are one tree: {**base, "lora": {…}} with "a" and "b"
instead of each adapted kernel. They are merged before the model is applied, so it works for any
model.

With `lora.base=int8` frozen layer matrices are int8 values, and "int8_scales"
holds their scales. Each layer dequantizes its kernels where it reads them and adds the
adaptation (as in QLoRA, Dettmers et al. 2023, with 4 bits).

Shape letters: N layers and experts, R rank; a kernel is [N, *inputs, *outputs], or without N
outside a stack.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from lm.config.patterns import compile_patterns
from lm.errors import UserError
from lm.models.frozen import REFERENCE, is_frozen, with_reference, without_reference
from lm.models.parameter_groups import matching
from lm.models.quantized_kernel import QuantizedKernel
from lm.models.variables import (
    KERNELS,
    LORA,
    Kind,
    Param,
    ParamInfo,
    flat,
    nested,
    param_infos,
)

Tree = Any
SCALES = "int8_scales"


def add_lora(params: Tree, options: ConfigDict, rng: jax.Array) -> Tree:
    """Add the low-rank factors of every targeted kernel to boxed parameters.

    A [N, *inputs, R] is uniform in ± inputs^-0.5, as in the authors' code, and B [N, R, *outputs]
    zero: initially the adapted model equals the base model.

    Args:
        params: boxed parameters.
        options: the configuration's section "lora".
        rng: random key.

    Returns:
        {**params, "lora": …}, and "int8_scales" with `lora.base=int8`.

    Raises:
        UserError: a pattern of `lora.targets` matches no kernel, or there are no patterns.
    """
    params = without_reference(params)
    infos = param_infos(params)
    kernels = [path for path, i in infos.items() if i.role.kind in KERNELS and not is_frozen(path)]
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
    scales = {}
    if options.base == "int8":
        train = matching("lora.train", options.train, nn.meta.unbox(boxes), strict=False)
        for path, info in infos.items():
            is_matrix = info.role.kind == Kind.MATRIX and info.role.part in ("layers", "body")
            if is_matrix and not train[path].any() and not is_frozen(path):
                boxes[path], scales[path] = _in_int8(boxes[path], info)
    return {**nested(boxes), LORA: nested(adapters), **({SCALES: nested(scales)} if scales else {})}


def adapted_params(params: Tree, alpha: float, frozen: Collection[str] = ()) -> Tree:
    """Return the parameters to apply the model with; int8 kernels are adapted in their layers.

    Args:
        params: parameters of the base, its adaptation, and frozen models.
        alpha: `lora.alpha`.
        frozen: names of the frozen models that the loss needs; the reference is the base.
    """
    base, adapters, scales = _parts(params)
    for path, scale in scales.items():
        base[path] = QuantizedKernel(base[path], scale, jnp.float32)
    start = nested(base)
    for path in _adapted(adapters):
        a, b = adapters[f"{path}/a"], adapters[f"{path}/b"]
        kernel = base[path]
        base[path] = (
            AdaptedKernel(kernel, a, b, alpha) if path in scales else _add(kernel, a, b, alpha)
        )
    return with_reference(nested(base), start) if REFERENCE in frozen else nested(base)


def merge_lora(params: Tree, alpha: float) -> Tree:
    """Return only the model's parameters, with adapted kernels merged in float32."""
    base, adapters, scales = _parts(params)
    for path, scale in scales.items():
        base[path] = QuantizedKernel(base[path], scale, jnp.float32).unbox()
    for path in _adapted(adapters):
        base[path] = _add(base[path], adapters[f"{path}/a"], adapters[f"{path}/b"], alpha)
    return nested(base)


def kernel_of(path: str) -> str:
    """Return the path of the kernel that a low-rank factor or scale belongs to, or ""."""
    room, _, rest = path.partition("/")
    return {LORA: rest.rpartition("/")[0], SCALES: rest}.get(room, "")


def quantize_loaded(
    loaded: Mapping[str, jax.Array],
    shardings: Mapping[str, NamedSharding],
    infos: Mapping[str, ParamInfo],
) -> dict[str, jax.Array]:
    """Return loaded parameters in this run's format, with scales for those in 8 bits.

    Args:
        loaded: float32 parameters by path.
        shardings: shardings of all parameters of this run by path.
        infos: role and axes of the parameters.
    """
    kernels = {path: x for path, x in loaded.items() if f"{SCALES}/{path}" in shardings}

    def quantize(kernels: dict[str, jax.Array]) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}
        for path, kernel in kernels.items():
            boxed = QuantizedKernel.quantize(kernel, infos[path], jnp.float32)
            found |= {path: boxed.values, f"{SCALES}/{path}": boxed.scale}
        return found

    paths = jax.eval_shape(quantize, kernels)
    placed = {path: shardings[path] for path in paths}
    return {**loaded, **jax.jit(quantize, out_shardings=placed)(kernels)}


@flax.struct.dataclass
class AdaptedKernel(nn.meta.AxisMetadata[jax.Array]):
    """8-bit kernel and its low-rank factors, added where it is read.

    Attributes:
        kernel: the kernel; the first field, because its values have the shape the model expects.
        a: factor A, see `add_lora`.
        b: factor B.
        alpha: the update is scaled by alpha / rank.
    """

    kernel: QuantizedKernel
    a: jax.Array
    b: jax.Array
    alpha: float = flax.struct.field(pytree_node=False)

    def unbox(self) -> jax.Array:
        """Return the adapted kernel, float32."""
        return _add(self.kernel.unbox(), self.a, self.b, self.alpha)

    def replace_boxed(self, val: Any) -> Any:
        """Return the value itself, which replaces the kernel."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> AdaptedKernel:
        """Return the same kernel for a stack: axes have no names."""
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> AdaptedKernel:
        """Return the same kernel for a layer."""
        return self


def _parts(params: Tree) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the parameters of the model, the factors and the scales, by path."""
    base = {name: leaf for name, leaf in params.items() if name not in (LORA, SCALES)}
    return flat(base), flat(params.get(LORA, {})), flat(params.get(SCALES, {}))


def _adapted(adapters: Iterable[str]) -> set[str]:
    return {path.rpartition("/")[0] for path in adapters}


def _add(kernel: jax.Array, a: jax.Array, b: jax.Array, alpha: float) -> jax.Array:
    product = partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
    for _ in range(a.ndim + b.ndim - 2 - kernel.ndim):  # layers and experts
        product = jax.vmap(product)
    return kernel + alpha / a.shape[-1] * product(a, b)


def _in_int8(box: Param, info: ParamInfo) -> tuple[Param, Param]:
    """Return the values and the scale of a kernel."""
    assert box.role is not None
    found = QuantizedKernel.quantize(box.value, info, jnp.float32)
    middle, end = info.n_stacked, info.n_stacked + info.role.inputs
    axes = (*info.axes[:middle], *["one"] * info.role.inputs, *info.axes[end:])
    scale = Param(found.scale, axes, role=replace(box.role, kind=Kind.SCALE))
    return Param(found.values, box.names, role=box.role), scale


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
