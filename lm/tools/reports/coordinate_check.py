"""Coordinate check of muP: activation sizes in the first steps as a function of width.

In muP they neither grow nor vanish with width; in the standard parametrization they grow (Yang et
al. 2022, arXiv 2203.03466, §8.1 and appendix D.1).
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lm.experiment import build
from lm.models.variables import Params, as_variables, flat

# Measured outputs: end of a module path, and the method that returns them.
WATCHED = {
    "attention": "attention/out/__call__",
    "feed-forward": "feed_forward/__call__",
    "logits": "logits",
}
Scales = dict[str, list[float]]


def activation_scales(config: ConfigDict, batch: Mapping[str, jax.Array], steps: int) -> Scales:
    """Return mean |x| of each output of `WATCHED` in a decoder after 0, 1, … `steps` updates.

    Args:
        config: Configuration of the decoder.
        batch: Arrays of a single batch, used for all updates.
        steps: Number of updates.
    """
    experiment = build(config, jax.devices()[:1])
    state = experiment.init_state()
    batches = {name: jnp.asarray(values)[None] for name, values in batch.items()}

    def watched(module: nn.Module, method: str) -> bool:
        return _name("/".join((*module.path, method))) != ""

    @jax.jit
    def measure(params: Params, tokens_BL: jax.Array) -> dict[str, jax.Array]:
        _, seen = experiment.model.apply(
            as_variables(params),
            tokens_BL,
            capture_intermediates=watched,
            mutable="intermediates",
        )
        kept = flat(seen["intermediates"])
        return {_name(path): jnp.abs(output).mean() for path, (output,) in kept.items()}

    scales: Scales = {name: [] for name in WATCHED}
    for step in range(steps + 1):
        for name, scale in measure(state.inference_params, batches["inputs"][0]).items():
            scales[name].append(float(scale))
        if step < steps:
            state, _ = experiment.train_steps(state, batches)
    return scales


def _name(path: str) -> str:
    """Return the key of `WATCHED` for a path, or ""."""
    return next((name for name, end in WATCHED.items() if f"/{path}".endswith(f"/{end}")), "")
