"""Kernel selection for device descriptions, without the hardware.

Kernel libraries, and our layers when traced without a mesh, query this process for its devices and
their capabilities.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from lm.errors import UserError
from lm.models.attention import CALLED


@contextlib.contextmanager
def kernels_for(devices: np.ndarray) -> Iterator[None]:
    """Answer capability queries of our layers, JAX's cuDNN calls and tokamax for devices.

    Args:
        devices: mesh devices to trace for; no effect for a kind that is present.

    Raises:
        UserError: this JAX version has no such queries.
    """
    device = devices.flat[0]
    platform = CALLED.get(device.platform, device.platform)
    if jax.default_backend() == platform:
        yield
        return
    answers: list[tuple[Any, str, Callable]] = [
        (jax, "default_backend", lambda: platform),
        (jax, "device_count", lambda: devices.size),
    ]
    if platform == "gpu":
        answers += _answers_for_gpu(device)
    with contextlib.ExitStack() as stack:
        for module, name, answer in answers:
            if not hasattr(module, name):
                raise UserError(
                    f"JAX {jax.__version__} has no {module.__name__}.{name}, by which GPUs are "
                    "planned; tried with jax 0.10.2"
                )
            stack.enter_context(mock.patch.object(module, name, answer))
        yield


def _answers_for_gpu(device: Any) -> list[tuple[Any, str, Callable]]:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.extend import backend

    capability = float(device.compute_capability)

    def is_at_least(asked: str) -> bool:
        return capability >= float(asked)

    def is_equal(asked: str) -> bool:
        return capability == float(asked)

    return [
        (cudnn, "check_compute_capability", is_at_least),
        (cudnn, "is_cuda_compute_capability_equal", is_equal),
        (backend, "get_default_device", lambda: device),
    ]
