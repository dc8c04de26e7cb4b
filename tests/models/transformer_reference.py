"""The parts of Transformers as in their papers, in numpy, for one sequence at a time."""

import flax.linen as nn
import jax
import numpy as np
import scipy.special

# The least distance of every bucket of T5's published function (32 buckets up to 128), of keys on
# one side of the query; bidirectional, keys after it come 16 buckets later.
CAUSAL_BUCKETS = [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
BOTH_WAYS_BUCKETS = [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]


def draw(model, *inputs, method=None):
    """Random parameters of a model: biases and norms too, none is at a special value."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, method=method))
    rng = np.random.default_rng(0)

    def one(path, leaf):
        centre, deviation = (1, 0.2) if path[-1].key == "scale" else (0, 0.2)
        return np.float32(rng.normal(centre, deviation, leaf.shape))

    return jax.tree_util.tree_map_with_path(one, nn.meta.unbox(shapes["params"]))


def float64(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def layers(stack):
    """The parameters of each block in turn."""
    n_layers = len(jax.tree.leaves(stack["layers"])[0])
    return [jax.tree.map(lambda x, i=i: x[i], stack["layers"]) for i in range(n_layers)]


def layer_norm(x, p, eps):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * p["scale"] + p["bias"]


def rms_norm(x, p, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"]


def gelu(x):
    return x * scipy.special.ndtr(x)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def project(x, p):
    """x times a kernel whose outputs may be several dimensions, and the bias if there is one."""
    return np.tensordot(x, p["kernel"], 1) + p.get("bias", 0)


def attention(p, x, source, causal=False, scaled=True, bias=0.0):
    """Queries of x [length, width], keys and values of the source; `bias` is added to scores."""
    q, k, v = project(x, p["query"]), project(source, p["key"]), project(source, p["value"])
    scores = np.einsum("qhk,shk->hqs", q, k)
    scores = scores / np.sqrt(q.shape[-1]) + bias if scaled else scores + bias
    if causal:
        scores[:, ~np.tril(np.ones(scores.shape[1:], bool))] = -np.inf
    mixed = np.einsum("hqs,shk->qhk", scipy.special.softmax(scores, axis=-1), v)
    return np.tensordot(mixed, p["out"]["kernel"], 2) + p["out"].get("bias", 0)


def t5_bias(table, length, causal):
    """[heads, length, length]: what a table [32, heads] adds to the scores (Raffel 2020, §2.1)."""
    distances = np.arange(length) - np.arange(length)[:, None]  # of keys, columns, from queries
    return np.moveaxis(table[t5_buckets(distances, causal)], -1, 0)


def t5_buckets(distances, causal):
    if causal:
        past = np.maximum(-distances, 0)
        return np.searchsorted(CAUSAL_BUCKETS, past, side="right") - 1
    side = np.searchsorted(BOTH_WAYS_BUCKETS, abs(distances), side="right") - 1
    return side + 16 * (distances > 0)
