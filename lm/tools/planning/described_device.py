"""Kernels for devices that are described and not there.

Libraries of kernels, and our layers where a step is traced without a mesh, ask this process what
its devices are and can do.
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
    """Answer the questions of our layers, of JAX's cuDNN calls and of tokamax for devices.

    Args:
        devices: those of a mesh that is traced for; nothing happens for a kind that is there.

    Raises:
        UserError: this JAX has no such questions.
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
