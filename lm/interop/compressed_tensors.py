"""Quantized layers in model folders: the format "pack-quantized" of `compressed-tensors`.

`transformers` and vLLM read it. A weight [out, in] becomes `weight_packed`, int32 with the integers
of a row, plus half of their range, packed from the lowest bits; `weight_scale`, one per group of
inputs (4 bits) or row (8 bits); and `weight_shape`. Embeddings and output layers are not quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lm.errors import UserError
from lm.interop.tensor_files import PendingTensor, StoredTensor
from lm.models.quantized_kernel import BITS, QuantizedKernel, group_size
from lm.models.variables import Kind, ParamInfo, Role

_PARTS = PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
_MATRIX = ParamInfo(Role(Kind.MATRIX, inputs=1), ("one", "one"))


def bits_of(n_inputs: int, quantize: str) -> int:
    """Return the bits of a weight with `n_inputs`: the requested ones, or 8 if that is odd."""
    return BITS[quantize] if group_size(n_inputs) else 8


def quantized(tensor: PendingTensor, quantize: str) -> list[PendingTensor]:
    """Return the tensors that represent a weight [out, in] in 8 or 4 bits."""
    n_out, n_in = tensor.shape
    bits = bits_of(n_in, quantize)
    module = tensor.name.removesuffix("weight")
    n_groups = n_in // group_size(n_in) if bits == 4 else 1

    def part(packed: bool) -> np.ndarray:
        kernel = jnp.asarray(tensor.values().T, jnp.float32)
        box = QuantizedKernel.quantize(kernel, _MATRIX, jnp.float32, bits)
        if not packed:
            return np.asarray(box.scale, np.float32).reshape(n_groups, n_out).T
        halves = np.concatenate(box.halves(), 1) if bits == 4 else np.asarray(box.values)
        return _pack(halves.reshape(n_in, n_out).T, bits)

    width = -(-n_in * bits // 32)
    return [
        PendingTensor(module + PACKED, (n_out, width), partial(part, True)),
        PendingTensor(module + SCALE, (n_out, n_groups), partial(part, False)),
        PendingTensor(module + SHAPE, (2,), lambda: np.array(tensor.shape, np.int64)),
    ]


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack signed integers [out, in] into int32 [out, ⌈in · bits / 32⌉]."""
    each = 32 // bits
    whole = np.zeros((len(values), -(-values.shape[1] // each) * each), np.uint32)
    whole[:, : values.shape[1]] = values.astype(np.int32) + 2 ** (bits - 1)
    shifts = np.arange(each, dtype=np.uint32) * bits
    parts = whole.reshape(len(values), -1, each) << shifts
    return np.bitwise_or.reduce(parts, axis=2).view(np.int32)


def quantization_config(inputs: Mapping[str, int], quantize: str) -> dict[str, Any]:
    """Return `quantization_config` for config.json.

    Args:
        inputs: number of inputs of the quantized weights, by name with "{}" for the layer.
        quantize: int8 or int4.
    """
    schemes: dict[tuple[int, int], list[str]] = {}
    for name, n in inputs.items():
        bits = bits_of(n, quantize)
        pattern = name.removesuffix(".weight").replace(".", r"\.").replace("{}", r"\d+")
        schemes.setdefault((bits, group_size(n) if bits == 4 else 0), []).append(f"re:.*{pattern}$")
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(schemes) == 1 else targets,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "dynamic": False,
                "strategy": "group" if size else "channel",
                **({"group_size": size} if size else {}),
            },
        }
        for i, ((bits, size), targets) in enumerate(schemes.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class _PackedTensor(StoredTensor):
    """Quantized weight that is read as float32."""

    packed: StoredTensor | None = None
    scale: StoredTensor | None = None

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read the rows start … stop - 1 in float32."""
        assert self.packed is not None
        assert self.scale is not None
        n_in, bits = self.shape[1], 8 if self.packed.shape[1] * 4 >= self.shape[1] else 4
        shifts = np.arange(32 // bits, dtype=np.uint32) * bits
        words = self.packed.stored_rows(start, stop).view(np.uint32)
        values = ((words[..., None] >> shifts) & (2**bits - 1)).reshape(len(words), -1)[:, :n_in]
        scale = self.scale.rows(start, stop)
        groups = (values.astype(np.float32) - 2 ** (bits - 1)).reshape(*scale.shape, -1)
        return (groups * scale[..., None]).reshape(-1, n_in)


def unpacked(
    path: Path, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the tensors of a folder, with quantized weights read as float32.

    Args:
        path: folder, for messages.
        config: its `quantization_config`.
        stored: its tensors by name.

    Raises:
        UserError: weights are quantized in another way, or parts of one do not match.
    """
    kind = config.get("quant_method"), config.get("format")
    if kind != ("compressed-tensors", "pack-quantized"):
        raise UserError(
            f"{path}: weights quantized by {kind[0]} ({kind[1]}) are not supported, only those of "
            "compressed-tensors (pack-quantized); save the model without"
        )
    found = {name: x for name, x in stored.items() if not name.endswith(_PARTS)}
    for name, packed in stored.items():
        module = name.removesuffix(PACKED)
        if module == name:
            continue
        scale = stored.get(module + SCALE)
        if f"{module}weight_zero_point" in stored or f"{module}weight_g_idx" in stored:
            raise UserError(f"{path}: {module}weight has zero points or a custom order")
        if scale is None or len(scale.shape) != 2 or len(packed.shape) != 2:
            raise UserError(f"{path}: {module}weight lacks a scale, or its parts are not matrices")
        shape = _shape(path, module, stored)
        _check_parts(path, module, shape, packed.shape, scale.shape)
        found[module + "weight"] = _PackedTensor(
            module + "weight", packed.file, shape, packed=packed, scale=scale
        )
    return found


def _shape(path: Path, module: str, stored: Mapping[str, StoredTensor]) -> tuple[int, ...]:
    if module + SHAPE not in stored or stored[module + SHAPE].shape != (2,):
        raise UserError(f"{path}: {module}{SHAPE} is missing, or does not have two numbers")
    return tuple(map(int, stored[module + SHAPE].stored_rows(0, 2)))


def _check_parts(path: Path, module: str, shape: Sequence[int], *parts: Sequence[int]) -> None:
    (n_out, n_in), (packed, scale) = shape, parts
    widths = {-(-n_in * bits // 32) for bits in BITS.values()}
    is_whole = min(shape) > 0 and packed[0] == scale[0] == n_out and packed[1] in widths
    if not is_whole or scale[1] < 1 or n_in % scale[1]:
        raise UserError(
            f"{path}: {module}weight of shape {tuple(shape)} does not match its parts, "
            f"{tuple(packed)} and {tuple(scale)}"
        )
