"""First-version .bin files of llama2.c (Karpathy 2023): a Llama in float32.

The file has seven integers, then the tensors, each for all layers in turn. Its RoPE
rotates the pairs (2i, 2i+1) of a head: the rows of queries and keys are permuted into halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from lm.errors import UserError
from lm.interop.llama import LLAMA
from lm.interop.tensor_files import StoredTensor
from lm.interop.tensor_mapping import TensorMapping, output_mapping, same_layout
from lm.models.transformer_config import TransformerConfig

_HEADER = 7 * 4
_NEWER = 0x616B3432  # first number in files of later versions

_ATTENTION, _FEED_FORWARD = "stack/layers/attention", "stack/layers/feed_forward"


def _mappings(_: TransformerConfig) -> Sequence[TensorMapping]:
    rotated = "(H J 2) D", "D H (2 J)"
    return [
        same_layout("tok_embeddings", "tokens/embedding"),
        same_layout("layers.{}.attention_norm", "stack/layers/attention_norm/scale"),
        TensorMapping("layers.{}.wq", (f"{_ATTENTION}/query/kernel",), *rotated),
        TensorMapping("layers.{}.wk", (f"{_ATTENTION}/key/kernel",), *rotated),
        TensorMapping("layers.{}.wv", (f"{_ATTENTION}/value/kernel",), "(G K) D", "D G K"),
        TensorMapping("layers.{}.wo", (f"{_ATTENTION}/out/kernel",), "D (H K)", "H K D"),
        same_layout("layers.{}.ffn_norm", "stack/layers/feed_forward_norm/scale"),
        TensorMapping("layers.{}.w1", (f"{_FEED_FORWARD}/gate/kernel",), "F D", "D F"),
        TensorMapping("layers.{}.w2", (f"{_FEED_FORWARD}/out/kernel",), "D F", "F D"),
        TensorMapping("layers.{}.w3", (f"{_FEED_FORWARD}/in/kernel",), "F D", "D F"),
        same_layout("norm", "stack/final_norm/scale"),
        output_mapping("output"),
    ]


FAMILY = replace(LLAMA, model_type="llama2.c", base=_mappings)


@dataclass(frozen=True)
class _Floats(StoredTensor):
    """Float32 tensor starting at byte `offset` of the file."""

    offset: int = 0

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read the rows start … stop - 1 in float32."""
        row = prod(self.shape[1:])
        count, offset = (stop - start) * row, self.offset + 4 * start * row
        values = np.fromfile(self.file, "<f4", count, offset=offset)
        return self.require_finite(values.reshape(-1, *self.shape[1:]))


def read_bin(file: Path) -> tuple[TransformerConfig, dict[str, StoredTensor]]:
    """Return the configuration and tensors of a file.

    Raises:
        UserError: the file has another version or kind, or is truncated.
    """
    size = file.stat().st_size
    numbers = np.fromfile(file, "<i4", count=7)
    if len(numbers) < 7 or numbers[0] == _NEWER or min(*numbers[:5], numbers[6]) < 1:
        raise UserError(
            f"{file} is not a .bin file of llama2.c's first version (export.py's legacy)"
        )
    dim, hidden, n_layers, n_heads, n_kv_heads, signed_vocab, length = map(int, numbers)
    vocab, tied = abs(signed_vocab), signed_vocab > 0
    if dim % n_heads or n_heads % n_kv_heads or dim // n_heads % 2:
        raise UserError(f"{file}: a width of {dim} is not divisible by {n_heads} heads")
    head_dim = dim // n_heads
    of_layers: dict[str, tuple[int, ...]] = {
        "attention_norm": (dim,),
        "wq": (dim, dim),
        "wk": (n_kv_heads * head_dim, dim),
        "wv": (n_kv_heads * head_dim, dim),
        "wo": (dim, dim),
        "ffn_norm": (dim,),
        "w1": (hidden, dim),
        "w2": (dim, hidden),
        "w3": (hidden, dim),
    }
    first = {"tok_embeddings": (vocab, dim)}
    last = {"norm": (dim,), "cosines": (length, head_dim // 2), "sines": (length, head_dim // 2)}
    last |= {} if tied else {"output": (vocab, dim)}
    n_numbers = n_layers * sum(map(prod, of_layers.values()))
    n_numbers += sum(map(prod, (*first.values(), *last.values())))
    if (expected := _HEADER + 4 * n_numbers) != size:
        what = "is truncated" if expected > size else "is too long"
        raise UserError(f"{file} {what}: {size:,} bytes instead of {expected:,}")
    shapes: dict[str, tuple[int, ...]] = dict(first)
    for name, shape in of_layers.items():
        shapes |= {f"layers.{i}.{name}": shape for i in range(n_layers)}
    stored: dict[str, StoredTensor] = {}
    offset = _HEADER
    for name, shape in (shapes | last).items():
        stored[name] = _Floats(name, file, shape, offset=offset)
        offset += 4 * prod(shape)
    del stored["cosines"], stored["sines"]
    config = TransformerConfig(
        **dict(LLAMA.fixed),
        n_layers=n_layers,
        d_model=dim,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=hidden,
        vocab_size=vocab,
        max_length=length,
        attention_bias="none",
        tie_embeddings=tied,
    )
    return config, stored
