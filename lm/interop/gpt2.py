"""GPT-2 (Radford et al. 2019): `GPT2LMHeadModel`. Its linear layers are [in, out], and queries,
keys and values are one."""

from __future__ import annotations

from lm.interop.family import Family, Values, choose, require_equal, word_for
from lm.interop.tensor_mapping import TensorMapping, norm, output, same
from lm.models.transformer_config import TransformerConfig

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu": "gelu_erf",
    "relu": "relu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_ATTENTION, _FEED_FORWARD = "stack/layers/attention", "stack/layers/feed_forward"
_QUERY_KEY_VALUE = tuple(f"{_ATTENTION}/{name}" for name in ("query", "key", "value"))


def _paths(leaf: str) -> tuple[str, ...]:
    return tuple(f"{path}/{leaf}" for path in _QUERY_KEY_VALUE)


def _read(theirs: Values) -> Values:
    require_equal(theirs, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return {
        "d_ff": theirs.get("n_inner") or 4 * theirs["n_embd"],
        "activation": choose(theirs, "activation_function", ACTIVATIONS, "gelu_new"),
        "norm_eps": theirs.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": theirs.get("tie_word_embeddings", True),
        "attention_scale": 0.0 if theirs.get("scale_attn_weights", True) else 1.0,
        "dropout": theirs.get("resid_pdrop", 0.1),
        "attention_dropout": theirs.get("attn_pdrop", 0.1),
    }


def _write(config: TransformerConfig) -> Values:
    return {
        "n_inner": config.d_ff,
        "activation_function": word_for(config.activation, ACTIVATIONS, "activation"),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_attn_weights": config.score_scale != 1,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
    }


GPT2 = Family(
    model_type="gpt2",
    model="decoder",
    classes={frozenset(): "GPT2LMHeadModel"},
    prefix="transformer.",
    base=lambda _: [
        same("transformer.wte.weight", "tokens/embedding"),
        same("transformer.wpe.weight", "positions/embedding"),
        *norm("transformer.h.{}.ln_1", "stack/layers/attention_norm"),
        TensorMapping(
            "transformer.h.{}.attn.c_attn.weight", _paths("kernel"), "D (P H K)", "D H K"
        ),
        TensorMapping("transformer.h.{}.attn.c_attn.bias", _paths("bias"), "(P H K)", "H K"),
        TensorMapping(
            "transformer.h.{}.attn.c_proj.weight", (f"{_ATTENTION}/out/kernel",), "(H K) D", "H K D"
        ),
        same("transformer.h.{}.attn.c_proj.bias", f"{_ATTENTION}/out/bias"),
        *norm("transformer.h.{}.ln_2", "stack/layers/feed_forward_norm"),
        same("transformer.h.{}.mlp.c_fc.weight", f"{_FEED_FORWARD}/in/kernel"),
        same("transformer.h.{}.mlp.c_fc.bias", f"{_FEED_FORWARD}/in/bias"),
        same("transformer.h.{}.mlp.c_proj.weight", f"{_FEED_FORWARD}/out/kernel"),
        same("transformer.h.{}.mlp.c_proj.bias", f"{_FEED_FORWARD}/out/bias"),
        *norm("transformer.ln_f", "stack/final_norm"),
        output("lm_head.weight"),
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
