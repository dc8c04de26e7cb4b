"""Kernels for a GPU that is described and not there.

Libraries of kernels ask the process's default device what the GPU can do, while a step is traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax

from lm.errors import UserError


@contextlib.contextmanager
def kernels_for(device: Any) -> Iterator[None]:
    """Answer the questions of JAX's cuDNN calls and of tokamax for a described GPU.

    Args:
        device: device that is traced for; nothing happens for others than GPUs, and for GPUs that
            are there.

    Raises:
        UserError: this JAX has no such questions.
    """
    if device.platform not in ("gpu", "cuda") or jax.default_backend() == "gpu":
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.extend import backend

    capability = float(device.compute_capability)

    def is_at_least(asked: str) -> bool:
        return capability >= float(asked)

    def is_equal(asked: str) -> bool:
        return capability == float(asked)

    answers: list[tuple[Any, str, Callable]] = [
        (cudnn, "check_compute_capability", is_at_least),
        (cudnn, "is_cuda_compute_capability_equal", is_equal),
        (backend, "get_default_device", lambda: device),
    ]
    with contextlib.ExitStack() as stack:
        for module, name, answer in answers:
            if not hasattr(module, name):
                raise UserError(
                    f"JAX {jax.__version__} has no {module.__name__}.{name}, by which GPUs are "
                    "planned; tried with jax 0.10.2"
                )
            stack.enter_context(mock.patch.object(module, name, answer))
        yield
