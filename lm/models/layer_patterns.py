"""Layer patterns: which layers of a stack are global, NoPE or MoE."""

from __future__ import annotations

from typing import Any

import numpy as np


def _layers(numbers: tuple[float, ...], n_layers: int, every: int, first: int = 0) -> np.ndarray:
    """Return the numbered layers, or without numbers every n-th from `first` on."""
    i = np.arange(n_layers)
    return np.isin(i, numbers) if numbers else (i >= first) & ((i - first + 1) % every == 0)


def global_layers(m: Any, n_layers: int) -> np.ndarray:
    """Return which layers attend beyond the window, [N] bool.

    Args:
        m: section "model" of a configuration, or a TransformerConfig.
        n_layers: number of layers of the stack.
    """
    if not m.window:
        return np.ones(n_layers, bool)
    every = m.global_every or n_layers + 1
    return _layers(m.global_layers, n_layers, every, 1 - every if m.global_first else 0)


def nope_layers(m: Any, n_layers: int) -> np.ndarray:
    """Return which layers have no rotary positions, [N] bool; arguments as in `global_layers`."""
    return _layers(m.nope_layers, n_layers, m.nope_every or n_layers + 1)


def expert_layers(m: Any, n_layers: int) -> np.ndarray:
    """Return which layers have experts, [N] bool; arguments as in `global_layers`."""
    if not m.n_experts:
        return np.zeros(n_layers, bool)
    return _layers(m.expert_layers, n_layers, m.experts_every, m.dense_layers)
