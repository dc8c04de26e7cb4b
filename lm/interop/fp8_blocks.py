"""Weights as 8-bit floats, E4M3, with a scale per block, as released for DeepSeek-V3.

A weight [out, in] has `NAME_scale_inv`, one factor for each block of `weight_block_size`
(DeepSeek-AI 2024b, §3.3.2); the last blocks of a row or column may be smaller.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lm.errors import UserError
from lm.interop.tensor_files import StoredTensor

FP8, _SCALE = "F8_E4M3", "_scale_inv"


@dataclass(frozen=True)
class _BlockTensor(StoredTensor):
    """Weight in 8-bit floats that is read as float32."""

    values: StoredTensor | None = None
    scales: StoredTensor | None = None
    block: tuple[int, int] = (128, 128)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read the rows start … stop - 1 in float32."""
        assert self.values is not None
        assert self.scales is not None
        height, width = self.block
        scales = self.scales.rows(start // height, -(-stop // height))
        of_rows = scales[np.arange(start, stop) // height - start // height]
        values = _stored_rows(self.values, start, stop).astype(np.float32)
        weight = values * of_rows.repeat(width, axis=1)[:, : self.shape[1]]
        return self.require_finite(weight)


def _stored_rows(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
    """Read rows of 8-bit floats, for which `safetensors` has no NumPy type."""
    with tensor.file.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        first, _ = json.loads(file.read(n_header))[tensor.name]["data_offsets"]
        width = tensor.shape[1]
        file.seek(8 + n_header + first + start * width)
        data = file.read((stop - start) * width)
    return np.frombuffer(data, ml_dtypes.float8_e4m3fn).reshape(-1, width)


def fp8_weights(
    path: Path, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the tensors of a folder, with weights in 8-bit floats read as float32.

    Args:
        path: folder, for messages.
        config: its `quantization_config`.
        stored: its tensors by name.

    Raises:
        UserError: the blocks are not described, or scales do not match their weight.
    """
    sizes = config.get("weight_block_size")
    if not (isinstance(sizes, list) and len(sizes) == 2 and all(_is_size(n) for n in sizes)):
        raise UserError(f"{path}: weight_block_size={sizes} does not have the two sizes of a block")
    block = sizes[0], sizes[1]
    found = {name: x for name, x in stored.items() if not name.endswith(_SCALE)}
    for name, scales in stored.items():
        weight = name.removesuffix(_SCALE)
        if weight == name:
            continue
        values = stored.get(weight)
        if values is None or values.type != FP8 or len(values.shape) != 2:
            raise UserError(f"{path}: {name} has no matrix in 8-bit floats")
        blocks = tuple(-(-n // size) for n, size in zip(values.shape, block, strict=True))
        if scales.shape != blocks:
            raise UserError(f"{path}: {name} has the shape {scales.shape}, not {blocks}")
        scales.check_weights()
        found[weight] = _BlockTensor(
            weight, values.file, values.shape, values=values, scales=scales, block=block
        )
    return found


def _is_size(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n > 0
