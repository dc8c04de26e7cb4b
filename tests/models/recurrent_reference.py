"""LSTM layers as in Zaremba et al. 2014, in numpy, for one sequence at a time."""

import flax.linen as nn
import jax
import numpy as np
from scipy.special import expit


def draw(model, *inputs, seed=0):
    """Draw random parameters of a model, biases included."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: np.float32(rng.normal(0, 0.5, leaf.shape)), nn.meta.unbox(shapes["params"])
    )


def init_linear(p, x):
    return np.tensordot(x, p["kernel"], 1) + p.get("bias", 0)


def layer(p, x, h=0.0, c=0.0):
    """Outputs [L, H] and last cell of inputs [L, D]; h and c are the state before."""
    outputs = []
    n_hidden = p["recurrent"]["kernel"].shape[0]
    h, c = np.zeros(n_hidden) + h, np.zeros(n_hidden) + c
    for x_t in x:
        i, f, g, o = init_linear(p["input"], x_t) + init_linear(p["recurrent"], h)
        c = expit(f) * c + expit(i) * np.tanh(g)
        h = expit(o) * np.tanh(c)
        outputs.append(h)
    return np.array(outputs), c


def stack(p, x, both_ways=False, before=None):
    """Outputs [L, H] of all layers, and each layer's last (h, c)."""
    finals = []
    for i in range(sum("reverse" not in name for name in p)):
        y, c = layer(p[f"layer_{i}"], x, *(before[i] if before else ()))
        final = (y[-1], c)
        if both_ways:
            z, c = layer(p[f"layer_{i}_reverse"], x[::-1])
            final = tuple(np.concatenate(pair) for pair in zip(final, (z[-1], c), strict=True))
            y = np.concatenate([y, z[::-1]], axis=1)
        finals.append(final)
        x = y
    return x, finals
