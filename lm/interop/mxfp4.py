"""Experts' weights in MXFP4 (Open Compute Project 2023), as gpt-oss was released.

`NAME_blocks`, [E, outputs, inputs / 32, 16] bytes, holds two numbers of 4 bits (E2M1) a byte, the
lower half first; `NAME_scales`, [E, outputs, inputs / 32] bytes, the power of two, plus 127, that
32 of them are multiplied by. The weight NAME is [E, inputs, outputs].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.errors import UserError
from lm.interop.tensor_files import StoredTensor

BLOCKS, SCALES = "_blocks", "_scales"
_POSITIVE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([_POSITIVE, -_POSITIVE])  # of each four bits
_BIAS, _NAN = 127, 255  # of the scales


@dataclass(frozen=True)
class _BlockTensor(StoredTensor):
    """Weight in MXFP4 that is read as float32."""

    blocks: StoredTensor | None = None
    scales: StoredTensor | None = None

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read the experts start … stop - 1 in float32."""
        assert self.blocks is not None
        assert self.scales is not None
        bytes_EFXY = self.blocks.stored_rows(start, stop)
        scales_EFX = self.scales.stored_rows(start, stop)
        if (scales_EFX == _NAN).any():
            raise UserError(f"{self.file}: {self.scales.name} holds NaN")
        pairs = np.stack([bytes_EFXY & 15, bytes_EFXY >> 4], axis=-1)
        numbers = VALUES[pairs].reshape(*scales_EFX.shape, -1)
        numbers = np.ldexp(numbers, scales_EFX.astype(np.int32)[..., None] - _BIAS)
        weight_EFD = numbers.reshape(*scales_EFX.shape[:2], -1)
        return np.ascontiguousarray(weight_EFD.swapaxes(1, 2))


def mxfp4_weights(
    path: Path, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the tensors of a folder, weights in MXFP4 to be read as float32.

    Args:
        path: folder, for messages.
        config: its `quantization_config`; names of tensors say all that is needed.
        stored: its tensors by name.

    Raises:
        UserError: the parts of a weight do not match.
    """
    del config
    found = {name: x for name, x in stored.items() if not name.endswith((BLOCKS, SCALES))}
    for name in stored:
        if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS not in stored:
            raise UserError(f"{path}: {name} has no blocks")
    for name, blocks in stored.items():
        weight = name.removesuffix(BLOCKS)
        if weight == name:
            continue
        scales = stored.get(weight + SCALES)
        shape = blocks.shape
        if scales is None or len(shape) != 4 or shape[3] != 16 or scales.shape != shape[:3]:
            parts = shape, None if scales is None else scales.shape
            raise UserError(f"{path}: blocks and scales of {weight} do not match: {parts}")
        if (blocks.type, scales.type) != ("U8", "U8"):
            raise UserError(f"{path}: blocks and scales of {weight} are no bytes")
        n_experts, n_out, n_blocks, _ = shape
        whole = (n_experts, 32 * n_blocks, n_out)
        found[weight] = _BlockTensor(weight, blocks.file, whole, blocks=blocks, scales=scales)
    return found
