"""A llama2.c file gives the results of the C program, written here in numpy for one sequence."""

import jax
import numpy as np
import pytest
import scipy.special

from lm.errors import UserError
from lm.interop import huggingface

DIM, HIDDEN, LAYERS, HEADS, GROUPS, VOCABULARY, LENGTH = 24, 20, 2, 4, 2, 30, 16
K = DIM // HEADS


def write(file, tied=True):
    """The arrays that were written, in the file's order."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(0, 0.3, shape).astype(np.float32)

    arrays = {
        "table": draw(VOCABULARY, DIM),
        "att_norm": 1 + draw(LAYERS, DIM),
        "wq": draw(LAYERS, DIM, DIM),
        "wk": draw(LAYERS, GROUPS * K, DIM),
        "wv": draw(LAYERS, GROUPS * K, DIM),
        "wo": draw(LAYERS, DIM, DIM),
        "ffn_norm": 1 + draw(LAYERS, DIM),
        "w1": draw(LAYERS, HIDDEN, DIM),
        "w2": draw(LAYERS, DIM, HIDDEN),
        "w3": draw(LAYERS, HIDDEN, DIM),
        "norm": 1 + draw(DIM),
        "cosines": draw(LENGTH, K // 2),
        "sines": draw(LENGTH, K // 2),
    }
    if not tied:
        arrays["output"] = draw(VOCABULARY, DIM)
    vocabulary = VOCABULARY if tied else -VOCABULARY
    header = [DIM, HIDDEN, LAYERS, HEADS, GROUPS, vocabulary, LENGTH]
    content = np.asarray(header, "<i4").tobytes() + b"".join(x.tobytes() for x in arrays.values())
    file.write_bytes(content)
    return arrays


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def rotate(x):
    """Numbers 2i and 2i + 1 of a head as a complex number, turned by its position."""
    frequencies = 10_000.0 ** (-np.arange(0, K, 2) / K)
    turns = np.exp(1j * np.arange(len(x))[:, None] * frequencies)[:, None]
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turns
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def reference(arrays, tokens):
    w = {name: x.astype(np.float64) for name, x in arrays.items()}
    x, n = w["table"][tokens], len(tokens)
    for i in range(LAYERS):
        y = rms_norm(x, w["att_norm"][i])
        q = rotate((y @ w["wq"][i].T).reshape(n, HEADS, K))
        k = rotate((y @ w["wk"][i].T).reshape(n, GROUPS, K)).repeat(HEADS // GROUPS, 1)
        v = (y @ w["wv"][i].T).reshape(n, GROUPS, K).repeat(HEADS // GROUPS, 1)
        scores = np.einsum("lhk,shk->hls", q, k) / np.sqrt(K)
        scores[:, ~np.tril(np.ones((n, n), bool))] = -np.inf
        mixed = np.einsum("hls,shk->lhk", scipy.special.softmax(scores, -1), v)
        x = x + mixed.reshape(n, DIM) @ w["wo"][i].T
        y = rms_norm(x, w["ffn_norm"][i])
        gate = y @ w["w1"][i].T
        x = x + (gate * scipy.special.expit(gate) * (y @ w["w3"][i].T)) @ w["w2"][i].T
    return rms_norm(x, w["norm"]) @ w.get("output", w["table"]).T


@pytest.mark.parametrize("tied", [True, False])
def test_logits_match_the_c_program(tmp_path, tied):
    arrays = write(tmp_path / "model.bin", tied)
    model, params = huggingface.load(tmp_path / "model.bin")
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 12)
    logits = jax.jit(model.apply)({"params": params}, tokens[None])
    np.testing.assert_allclose(logits[0], reference(arrays, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda content: content[:-4], "is truncated"),
        (lambda content: content + b"0000", "is too long"),
        (lambda content: content[:20], "not a .bin file of llama2.c"),
        (lambda content: b"24ka" + content[4:], "not a .bin file of llama2.c"),
        (lambda content: bytes(4) + content[4:], "not a .bin file of llama2.c"),
    ],
)
def test_another_file_is_rejected(tmp_path, spoil, expected):
    file = tmp_path / "model.bin"
    write(file)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UserError, match=expected):
        huggingface.load(file)
