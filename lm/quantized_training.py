"""Low-precision training: 8-bit matrix products, or quantization-aware training.

Quantization-aware training (Jacob et al. 2018, arXiv 1712.05877): the loss uses weights rounded as
by `decode.weights`, and the unrounded weights get its gradients (straight-through estimator;
Bengio et al. 2013, arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import jax
from ml_collections import ConfigDict

from lm.models.low_precision import in_low_precision
from lm.models.quantized_kernel import round_params
from lm.models.variables import Params, flat, nested
from lm.train_step import Steps


@dataclass(frozen=True)
class RoundedSteps(Steps):
    """Steps that compute the loss with rounded weights.

    Attributes:
        weights: a value of `decode.weights`.
    """

    weights: str

    def _merged(self, params: Params) -> Params:
        leaves = flat(super()._merged(params))
        rounded = round_params(leaves, self.param_infos, self.weights)
        moved = {path: x for path, x in rounded.items() if x is not leaves[path]}
        through = {
            path: leaves[path] + jax.lax.stop_gradient(x - leaves[path])
            for path, x in moved.items()
        }
        return nested(leaves | through)


def quantized_train_steps(steps: Steps, config: ConfigDict) -> Callable:
    """Return `Steps.train_steps` for a `--config.train.precision` other than none."""
    if config.train.precision == "qat":
        own = {field.name: getattr(steps, field.name) for field in fields(steps)}
        return RoundedSteps(**own, weights=config.decode.weights).train_steps
    return in_low_precision(steps.train_steps, config.train.precision)
