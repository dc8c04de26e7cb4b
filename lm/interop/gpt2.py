"""GPT-2 (Radford et al. 2019): `GPT2LMHeadModel`.

Its linear layers are [in, out]; one tensor contains the query, key and value projections.
"""

from __future__ import annotations

from dataclasses import replace

from lm.interop.activation_words import ACTIVATIONS
from lm.interop.family import (
    Family,
    Values,
    decoder_heads,
    hf_word,
    lm_word,
    require_equal,
)
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
    require_equal(hf, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
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


_HEADS, _CLASSES = decoder_heads("GPT2LMHeadModel", ("classes", "tags", "spans"))
_TAGS = replace(_HEADS["tags"], mappings=tuple(linear_mappings("classifier", "classifier")))
GPT2 = Family(
    model_type="gpt2",
    model="decoder",
    classes=_CLASSES,
    prefix="transformer.",
    heads=_HEADS | {"tags": _TAGS},
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
