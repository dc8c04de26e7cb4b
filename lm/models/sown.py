"""What a layer adds to the loss and reports of itself, without its callers passing it on.

Each is one number a row, in a Flax collection that `Steps` reads (`objectives/auxiliary.py`);
where nobody collects, as in decoding, it is not computed.
"""

from __future__ import annotations

import flax.linen as nn
import jax

LOSSES, METRICS = "losses", "metrics"
COLLECTIONS = (LOSSES, METRICS)


def add_loss(module: nn.Module, name: str, loss_B: jax.Array) -> None:
    """Add to the loss of each row; those of several layers add up."""
    module.sow(LOSSES, name, loss_B)


def report(module: nn.Module, name: str, value_B: jax.Array) -> None:
    """Report a figure of each row; it is averaged over layers."""
    module.sow(METRICS, name, value_B)
