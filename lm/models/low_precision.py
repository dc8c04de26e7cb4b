"""Training with 8-bit products of weight matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import flax.linen as nn

from lm.kernels.quantized_matmul import quantized_matmul
from lm.models.layers import Linear
from lm.models.variables import Kind


def in_low_precision(function: Callable, precision: str) -> Callable:
    """Return a function that computes the products of the layers' matrices in 8 bits.

    Heads, routers and experts keep the compute dtype, as do evaluation and decoding, which do not
    call this function.

    Args:
        function: function that applies a model.
        precision: a key of `lm.kernels.quantized_matmul.FORMATS`.
    """

    def intercept(method: Callable, args: Any, options: Any, context: Any) -> Any:
        module = context.module
        is_product = isinstance(module, Linear) and context.method_name == "product"
        if is_product and module.role.kind == Kind.MATRIX:
            return quantized_matmul(*args, module.dtype, precision)
        return method(*args, **options)

    @wraps(function)
    def intercepted(*args: Any) -> Any:
        with nn.intercept_methods(intercept):
            return function(*args)

    return intercepted
