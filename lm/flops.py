"""Model FLOPs by one stated convention, and the peak rates of chips.

FLOPs a token of a training step (forward and backward, nothing recomputed):
6 × (parameters that are multiplied: kernels and the output projection, not the embedding look-up)
+ 6 × layers × heads × head_dim × length, which counts the two attention products once for the
causal half that is needed (the dense convention, 12 ×, counts masked scores as work).
"""

from __future__ import annotations

import jax

from lm.experiment import Experiment

# Dense bfloat16 FLOP/s of one JAX device, as the makers publish them. A TPU7x chip is two devices.
PEAK_FLOPS = {
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Published bfloat16 FLOP/s of a device; None where there is no such figure (CPUs)."""
    matches = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def model_flops_per_token(experiment: Experiment) -> float:
    """FLOPs a token of one training step, by the convention above."""
    c = experiment.model.config
    multiplied = 0
    for path, leaf in jax.tree.leaves_with_path(experiment.state_shapes.params):
        names = [str(part.key) for part in path]
        tied_head = names == ["tokens", "embedding"] and c.tie_embeddings
        if names[-1] == "kernel" or tied_head:
            multiplied += leaf.size
    attention = c.n_layers * c.n_heads * c.head_dim * experiment.config.data.sequence_length
    return 6.0 * (multiplied + attention)
