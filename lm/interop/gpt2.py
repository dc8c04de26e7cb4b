"""GPT-2 (Radford et al. 2019): `GPT2LMHeadModel`.

Its linear layers are [in, out]; one tensor contains the query, key and value projections. Where
config.json divides the scores of layer i by i + 1 (the GPT-2s of Stanford CRFM), the queries are
divided as they are read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from lm.interop.activation_words import ACTIVATIONS
from lm.interop.family import (
    Family,
    Values,
    decoder_heads,
    hf_word,
    lm_word,
    require_equal,
)
from lm.interop.tensor_files import StoredTensor
from lm.interop.tensor_mapping import (
    TensorMapping,
    linear_mappings,
    norm_mappings,
    output_mapping,
    same_layout,
)
from lm.models.transformer_config import TransformerConfig

_ATTENTION, _FEED_FORWARD = "stack/layers/attention", "stack/layers/feed_forward"
_QUERY_KEY_VALUE = tuple(f"{_ATTENTION}/{name}" for name in ("query", "key", "value"))


def _paths(leaf: str) -> tuple[str, ...]:
    return tuple(f"{path}/{leaf}" for path in _QUERY_KEY_VALUE)


def _read(hf: Values) -> Values:
    require_equal(hf, add_cross_attention=False)
    return {
        "d_ff": hf.get("n_inner") or 4 * hf["n_embd"],
        "activation": lm_word(hf, "activation_function", ACTIVATIONS, "gelu_new"),
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": hf.get("tie_word_embeddings", True),
        "attention_scale": 0.0 if hf.get("scale_attn_weights", True) else 1.0,
        "dropout": hf.get("resid_pdrop", 0.1),
        "attention_dropout": hf.get("attn_pdrop", 0.1),
    }


def _write(config: TransformerConfig) -> Values:
    return {
        "n_inner": config.d_ff,
        "activation_function": hf_word(config.activation, ACTIVATIONS, "activation"),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_attn_weights": config.score_scale != 1,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
    }


@dataclass(frozen=True)
class _DividedQueries(StoredTensor):
    """Queries, keys and values, the first of which are divided by `divisor`."""

    whole: StoredTensor | None = None
    divisor: int = 1

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read the rows start … stop - 1 in float32."""
        assert self.whole is not None
        n = self.shape[-1]
        divisors = np.where(np.arange(n) < n // 3, self.divisor, 1).astype(np.float32)
        return self.whole.rows(start, stop) / (divisors if self.shape[1:] else divisors[start:stop])


def _adapted(hf: Values, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Divide the queries of layer i by i + 1 if config.json divides its scores."""
    found = dict(stored)
    for name, x in stored.items() if hf.get("scale_attn_by_inverse_layer_idx") else ():
        if layer := re.fullmatch(r"transformer\.h\.(\d{1,9})\.attn\.c_attn\.(weight|bias)", name):
            divisor = int(layer[1]) + 1
            found[name] = _DividedQueries(x.name, x.file, x.shape, x.type, whole=x, divisor=divisor)
    return found


_HEADS, _CLASSES = decoder_heads("GPT2LMHeadModel", ("classes", "tags", "spans"))
_TAGS = replace(_HEADS["tags"], mappings=tuple(linear_mappings("classifier", "classifier")))
GPT2 = Family(
    model_type="gpt2",
    model="decoder",
    classes=_CLASSES,
    prefix="transformer.",
    heads=_HEADS | {"tags": _TAGS},
    adapted=_adapted,
    base=lambda _: [
        same_layout("transformer.wte.weight", "tokens/embedding"),
        same_layout("transformer.wpe.weight", "positions/embedding"),
        *norm_mappings("transformer.h.{}.ln_1", "stack/layers/attention_norm"),
        TensorMapping(
            "transformer.h.{}.attn.c_attn.weight", _paths("kernel"), "D (P H K)", "D H K"
        ),
        TensorMapping("transformer.h.{}.attn.c_attn.bias", _paths("bias"), "(P H K)", "H K"),
        TensorMapping(
            "transformer.h.{}.attn.c_proj.weight", (f"{_ATTENTION}/out/kernel",), "(H K) D", "H K D"
        ),
        same_layout("transformer.h.{}.attn.c_proj.bias", f"{_ATTENTION}/out/bias"),
        *norm_mappings("transformer.h.{}.ln_2", "stack/layers/feed_forward_norm"),
        same_layout("transformer.h.{}.mlp.c_fc.weight", f"{_FEED_FORWARD}/in/kernel"),
        same_layout("transformer.h.{}.mlp.c_fc.bias", f"{_FEED_FORWARD}/in/bias"),
        same_layout("transformer.h.{}.mlp.c_proj.weight", f"{_FEED_FORWARD}/out/kernel"),
        same_layout("transformer.h.{}.mlp.c_proj.bias", f"{_FEED_FORWARD}/out/bias"),
        *norm_mappings("transformer.ln_f", "stack/final_norm"),
        output_mapping("lm_head.weight"),
    ],
    keys={
        "n_layer": "n_layers",
        "n_embd": "d_model",
        "n_head": "n_heads",
        "vocab_size": "vocab_size",
        "n_positions": "max_length",
    },
    fixed={"norm": "layernorm", "positions": "learned"},
    read=_read,
    write=_write,
    output="lm_head.weight",
    table="transformer.wte.weight",
    ignored=[r"transformer\.h\.\d+\.attn\.(masked_)?bias"],
)
