"""Experts' weights in MXFP4 (Open Compute Project 2023), as gpt-oss was released.

`NAME_blocks`, [E, outputs, inputs / 32, 16] bytes, has two 4-bit numbers (E2M1) per byte, the
lower half first; `NAME_scales`, [E, outputs, inputs / 32] bytes, has the exponent, plus 127, of the
power of two that scales 32 of them. The weight NAME is [E, inputs, outputs].
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
VALUES = np.concatenate([_POSITIVE, -_POSITIVE])  # for each four-bit code
_BIAS, _NAN = 127, 255  # in scales


@dataclass(frozen=True)
class _BlockTensor(StoredTensor):
    """MXFP4 weight that is read as float32."""

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
        with np.errstate(over="ignore"):  # refused below
            numbers = np.ldexp(numbers, scales_EFX.astype(np.int32)[..., None] - _BIAS)
        weight_EFD = numbers.reshape(*scales_EFX.shape[:2], -1)
        return self.require_finite(np.ascontiguousarray(weight_EFD.swapaxes(1, 2)))


def mxfp4_weights(
    path: Path, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the tensors of a folder, with MXFP4 weights read as float32.

    Args:
        path: folder, for messages.
        config: its `quantization_config`, unused: tensor names contain all information.
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
            raise UserError(f"{path}: blocks and scales of {weight} are not bytes")
        n_experts, n_out, n_blocks, _ = shape
        whole = (n_experts, 32 * n_blocks, n_out)
        found[weight] = _BlockTensor(weight, blocks.file, whole, blocks=blocks, scales=scales)
    return found
