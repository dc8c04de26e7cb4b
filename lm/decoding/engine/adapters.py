"""Low-rank adapters of several runs over one base model, selected per row (Hu et al. 2021).

Shape letters: A adapters, B rows, L tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lm.errors import UserError
from lm.models.layers import Linear
from lm.models.lora import kernel_of
from lm.models.parameter_groups import layer_numbers, layer_path
from lm.models.variables import ParamInfo
from lm.runs.checkpoints import ignore_line
from lm.runs.saved_params import SavedCheckpoint, read_adapters, saved_checkpoints
from lm.storage import AnyPath, storage_path

_KERNEL = "/kernel"
Factors = tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class Adapters:
    """Stacked low-rank factors of all adapters, by the path of the linear layer.

    Attributes:
        factors: A [A, I, R] and B [A, R, O], with alpha / rank folded into B; adapter 0 is all
            zeros.
    """

    factors: dict[str, Factors]

    def interceptor(self, adapters_B: jax.Array) -> Callable[..., Any]:
        """Return a Flax interceptor that adds each row's update to the linear layers.

        Args:
            adapters_B: adapter index of each row; 0: none.
        """

        def adapt(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            path = "/".join(module.path)
            if not isinstance(module, Linear) or context.method_name != "__call__":
                return method(*args, **kwargs)
            y = method(*args, **kwargs)
            if path not in self.factors:
                return y
            a_AIR, b_ARO = self.factors[path]

            def add(y: jax.Array) -> jax.Array:
                B, L = y.shape[:2]
                x_BLI = args[0].reshape(B, L, -1).astype(jnp.float32)
                h_BLR = jnp.einsum("BLI,BIR->BLR", x_BLI, a_AIR[adapters_B])
                update_BLO = jnp.einsum("BLR,BRO->BLO", h_BLR, b_ARO[adapters_B])
                changed = (y.astype(jnp.float32) + update_BLO.reshape(y.shape)).astype(y.dtype)
                has_one = (adapters_B > 0).reshape(B, *(1,) * (y.ndim - 1))
                return jnp.where(has_one, changed, y)

            return lax.cond((adapters_B > 0).any(), add, lambda y: y, y)

        return adapt


def load_adapters(
    base: AnyPath, folders: Mapping[str, AnyPath], infos: Mapping[str, ParamInfo]
) -> Adapters | None:
    """Load the newest adapters of LoRA runs; None if there are none.

    Args:
        base: folder of the served base run.
        folders: folder of each LoRA run by adapter name; the order determines the indices.
        infos: role and axes of the base's parameters.

    Raises:
        UserError: a run has no adapter, has another base, or trained more than the factors.
    """
    newest = saved_checkpoints(base, ignore_line)[0]
    found = [_layer_factors(name, folder, newest, infos) for name, folder in folders.items()]
    paths = sorted({path for one in found for path in one})
    rank = max((a.shape[-1] for one in found for a, _ in one.values()), default=0)

    def stacked(path: str) -> Factors:
        a, b = next(one[path] for one in found if path in one)
        nothing = np.zeros((a.shape[0], rank), np.float32), np.zeros((rank, b.shape[1]), np.float32)
        own = [one.get(path, nothing) for one in found]
        a_AIR = [np.pad(a, ((0, 0), (0, rank - a.shape[1]))) for a, _ in (nothing, *own)]
        b_ARO = [np.pad(b, ((0, rank - b.shape[0]), (0, 0))) for _, b in (nothing, *own)]
        return jnp.asarray(np.stack(a_AIR)), jnp.asarray(np.stack(b_ARO))

    return Adapters({path: stacked(path) for path in paths}) if paths else None


def _layer_factors(
    name: str, folder: AnyPath, base: SavedCheckpoint, infos: Mapping[str, ParamInfo]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return factors [I, R] and [R, O] of each linear layer that a run adapts."""
    where = f"--adapter {name}={storage_path(folder)}"
    saved = saved_checkpoints(folder, ignore_line)[0]
    of_base, own = base.metadata["checksums"], saved.metadata["checksums"]
    keys = (f"params/{path}" for path in base.shapes if f"params/{path}" in of_base)
    other = next((key for key in keys if own.get(key) != of_base[key]), None)
    if not saved.adapters:
        raise UserError(f"{where}: the run has no LoRA adapter; serve it with --workdir")
    if other is not None:
        raise UserError(
            f"{where}: {other} differs from the base; merge the run by lm merge, and serve that by "
            "--workdir"
        )
    factors, alpha = read_adapters(saved), saved.metadata["config"]["lora"]["alpha"]
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for kernel in sorted({kernel_of(path) for path in factors}):
        info = infos[kernel]
        if info.role.expert or not kernel.endswith(_KERNEL):
            raise UserError(f"{where}: serving several adapters does not support {kernel}")
        a, b = factors[f"lora/{kernel}/a"], factors[f"lora/{kernel}/b"]
        b = b * np.float32(alpha / a.shape[-1])
        numbers = layer_numbers(kernel, a)
        stacked = numbers is not None and numbers.ndim > 0
        layers = enumerate(numbers) if stacked and numbers is not None else [(None, None)]
        for i, number in layers:
            own_a, own_b = (a, b) if i is None else (a[i], b[i])
            path = kernel if number is None else layer_path(kernel, int(number))
            rank = own_a.shape[-1]
            inputs = prod(own_a.shape[:-1])
            found[path.removesuffix(_KERNEL)] = own_a.reshape(inputs, rank), own_b.reshape(rank, -1)
    return found
