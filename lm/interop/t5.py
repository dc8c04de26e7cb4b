"""T5 (Raffel et al. 2020) and T5 1.1 (Shazeer 2020): `T5ForConditionalGeneration`.

All layers of a stack share the relative positions, which their first layer keeps. Of 1.1 their
configuration says only `tie_word_embeddings: false`, which since transformers 5 means that logits
are not scaled; whether the output matrix is the table, the file says.
"""

from __future__ import annotations

from lm.interop.family import Family, Values, choose, word_for
from lm.interop.tensor_mapping import TensorMapping, linear, norm, output, same
from lm.kernels.dense import GATED
from lm.models.transformer_config import TransformerConfig

ACTIVATIONS = {
    "relu": "relu",
    "gated-gelu": "geglu",
    "gated-silu": "swiglu",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu_erf",
}


def _attention(name: str, path: str) -> list[TensorMapping]:
    return [
        *linear(f"{name}.q", f"{path}/query", "D", "H K"),
        *linear(f"{name}.k", f"{path}/key", "D", "H K"),
        *linear(f"{name}.v", f"{path}/value", "D", "H K"),
        *linear(f"{name}.o", f"{path}/out", "H K", "D"),
    ]


def _stack(stack: str, feed_forward: int, gated: bool) -> list[TensorMapping]:
    """The rows of "encoder" or "decoder", whose sublayers are numbered."""
    path, block = f"{stack}/layers", f"{stack}.block.{{}}.layer"
    first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    dense = f"{block}.{feed_forward}.DenseReluDense"
    return [
        *_attention(f"{block}.0.SelfAttention", f"{path}/attention"),
        same(first, f"{stack}/relative_bias/embedding"),
        *norm(f"{block}.0.layer_norm", f"{path}/attention_norm"),
        *linear(f"{dense}.wi_0", f"{path}/feed_forward/gate"),
        *linear(f"{dense}.wi_1" if gated else f"{dense}.wi", f"{path}/feed_forward/in"),
        *linear(f"{dense}.wo", f"{path}/feed_forward/out"),
        *norm(f"{block}.{feed_forward}.layer_norm", f"{path}/feed_forward_norm"),
        *norm(f"{stack}.final_layer_norm", f"{stack}/final_norm"),
    ]


def _read(theirs: Values) -> Values:
    scaled = theirs.get("scale_decoder_outputs", theirs.get("tie_word_embeddings", True))
    return {
        "n_decoder_layers": theirs.get("num_decoder_layers") or theirs["num_layers"],
        "relative_buckets": theirs.get("relative_attention_num_buckets", 32),
        "relative_max_distance": theirs.get("relative_attention_max_distance", 128),
        "norm_eps": theirs.get("layer_norm_epsilon", 1e-6),
        "activation": choose(theirs, "feed_forward_proj", ACTIVATIONS, "relu"),
        "tie_embeddings": True,
        "scale_logits": scaled,
        "dropout": theirs.get("dropout_rate", 0.1),
        "attention_dropout": theirs.get("dropout_rate", 0.1),
        "activation_dropout": theirs.get("dropout_rate", 0.1),
    }


def _write(config: TransformerConfig) -> Values:
    scaled = config.tie_embeddings and config.scale_logits
    return {
        "num_decoder_layers": config.n_decoder_layers or config.n_layers,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": word_for(config.activation, ACTIVATIONS, "activation"),
        "tie_word_embeddings": scaled,
        "dropout_rate": config.dropout,
        "is_encoder_decoder": True,
    }


def _base(config: TransformerConfig) -> list[TensorMapping]:
    gated, cross = config.activation in GATED, "decoder.block.{}.layer.1"
    return [
        same("shared.weight", "tokens/embedding"),
        *_stack("encoder", 1, gated),
        *_stack("decoder", 2, gated),
        *_attention(f"{cross}.EncDecAttention", "decoder/layers/cross_attention"),
        *norm(f"{cross}.layer_norm", "decoder/layers/cross_attention_norm"),
        output("lm_head.weight"),
    ]


T5 = Family(
    model_type="t5",
    model="encoder_decoder",
    classes={frozenset(): "T5ForConditionalGeneration"},
    prefix="",
    base=_base,
    keys={
        "num_layers": "n_layers",
        "d_model": "d_model",
        "num_heads": "n_heads",
        "d_kv": "head_dim",
        "d_ff": "d_ff",
        "vocab_size": "vocab_size",
    },
    fixed={
        "norm": "rmsnorm",
        "positions": "relative",
        "bias": False,
        "norm_bias": False,
        "attention_scale": 1.0,
        "max_length": 512,
        "final_dropout": True,
    },
    read=_read,
    write=_write,
    output="lm_head.weight",
    table="shared.weight",
    copies={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
    in_file=["tie_embeddings"],
    # A table that the released files of 1.0 hold and no model reads.
    ignored=[
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ],
)
