"""BART (Lewis et al. 2020), with the output layer or the heads of its classes for tasks, and mBART.

Encoder and decoder have separate position tables, whose rows 0 and 1 are unused, and embedding
norms. Their token tables are separate if `tie_word_embeddings` is false; a third one, which the
class then has but does not use, is a copy of the decoder's. Otherwise the tensors of a file
determine whether the output is tied. The bias of the logits, which the class stores as a buffer, is
zero in the released files; other values are refused. For tasks the decoder reads the text after its
own end. mBART (Liu et al. 2020) normalizes the inputs of sublayers and the output of a stack.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lm.interop.activation_words import ACTIVATIONS
from lm.interop.family import (
    Family,
    Head,
    UnsupportedConfig,
    Values,
    hf_word,
    lm_word,
    read_size,
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

_TOKENS = "model.{}.embed_tokens.weight"
OFFSET = 2  # rows of the position tables before position 0


def _attention(name: str, path: str) -> list[TensorMapping]:
    return [
        *linear_mappings(f"{name}.q_proj", f"{path}/query", "D", "H K"),
        *linear_mappings(f"{name}.k_proj", f"{path}/key", "D", "H K"),
        *linear_mappings(f"{name}.v_proj", f"{path}/value", "D", "H K"),
        *linear_mappings(f"{name}.out_proj", f"{path}/out", "H K", "D"),
    ]


def layer_mappings(stack: str) -> list[TensorMapping]:
    """Map the tensors of the layers of "encoder" or "decoder"."""
    path, layer = f"{stack}/layers", f"model.{stack}.layers.{{}}"
    return [
        *_attention(f"{layer}.self_attn", f"{path}/attention"),
        *norm_mappings(f"{layer}.self_attn_layer_norm", f"{path}/attention_norm"),
        *_attention(f"{layer}.encoder_attn", f"{path}/cross_attention"),
        *norm_mappings(f"{layer}.encoder_attn_layer_norm", f"{path}/cross_attention_norm"),
        *linear_mappings(f"{layer}.fc1", f"{path}/feed_forward/in"),
        *linear_mappings(f"{layer}.fc2", f"{path}/feed_forward/out"),
        *norm_mappings(f"{layer}.final_layer_norm", f"{path}/feed_forward_norm"),
    ]


def _stack(stack: str, positions: str, norm: str) -> list[TensorMapping]:
    """Map the tensors of "encoder" or "decoder"; two modules of ours lie outside of the stack."""
    return [
        same_layout(f"model.{stack}.embed_positions.weight", f"{positions}/embedding"),
        *norm_mappings(f"model.{stack}.layernorm_embedding", norm),
        *layer_mappings(stack),
    ]


def _base(config: TransformerConfig) -> list[TensorMapping]:
    apart = (("encoder", "source_tokens"), ("decoder", "tokens")) if config.separate_tokens else ()
    return [
        same_layout("model.shared.weight", "tokens/embedding"),
        *(same_layout(_TOKENS.format(stack), f"{path}/embedding") for stack, path in apart),
        *_stack("encoder", "source_positions", "source_embedding_norm"),
        *_stack("decoder", "positions", "embedding_norm"),
        output_mapping("lm_head.weight"),
    ]


def _with_tables(hf: Values, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors with the tables that files of before transformers 5 lack."""
    if hf.get("tie_word_embeddings") is not False or "model.shared.weight" not in stored:
        return stored
    table = stored["model.shared.weight"]
    return {_TOKENS.format(stack): table for stack in ("encoder", "decoder")} | stored


def read_stacks(hf: Values) -> Values:
    """Read the fields of config.json shared by BART and Whisper."""
    heads, width = (read_size(hf, f"encoder_{name}") for name in ("attention_heads", "ffn_dim"))
    if not heads or hf["d_model"] % heads:
        raise UnsupportedConfig(
            f"config.json: d_model={hf['d_model']} is not divisible by "
            f"encoder_attention_heads={heads}"
        )
    return {
        "n_encoder_heads": 0 if heads == hf["decoder_attention_heads"] else heads,
        "encoder_d_ff": 0 if width == hf["decoder_ffn_dim"] else width,
        "n_decoder_layers": hf.get("decoder_layers") or hf["encoder_layers"],
        "activation": lm_word(hf, "activation_function", ACTIVATIONS, "gelu"),
        "dropout": hf.get("dropout", 0.1),
        "attention_dropout": hf.get("attention_dropout", 0.0),
        "activation_dropout": hf.get("activation_dropout", 0.0),
    }


def write_stacks(config: TransformerConfig) -> Values:
    """Write the values of config.json shared by BART and Whisper."""
    return {
        "decoder_layers": config.n_decoder_layers or config.n_layers,
        "encoder_attention_heads": config.n_encoder_heads or config.n_heads,
        "encoder_ffn_dim": config.encoder_d_ff or config.d_ff,
        "activation_function": hf_word(config.activation, ACTIVATIONS, "activation"),
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
        "is_encoder_decoder": True,
    }


def _read(hf: Values) -> Values:
    apart = hf.get("tie_word_embeddings") is False
    return (
        read_stacks(hf)
        | read_start(hf, 2)
        | {"scale_embeddings": bool(hf.get("scale_embedding")), "tie_embeddings": not apart}
        | {"separate_tokens": apart}
    )


def read_start(hf: Values, default: int | None = None) -> Values:
    """Read the first token of a decoder that classifies; none if it is the text's last one."""
    start = hf.get("decoder_start_token_id", default)
    return {} if start is None or start == hf.get("eos_token_id", default) else {"start_id": start}


def _write(config: TransformerConfig) -> Values:
    values = {
        "scale_embedding": config.scale_embeddings,
        "tie_word_embeddings": not config.separate_tokens,
    }
    return write_stacks(config) | write_start(config) | values


def write_start(config: TransformerConfig) -> Values:
    """Write what `read_start` reads, unless it is the text's last token."""
    return {"decoder_start_token_id": config.start_id} if config.start_id >= 0 else {}


_TASKS = {
    frozenset({"pooler", "classes"}): "BartForSequenceClassification",
    frozenset({"spans"}): "BartForQuestionAnswering",
}
_HEAD = "classification_head"
HEADS = {
    "pooler": Head(("pooler",), tuple(linear_mappings(f"{_HEAD}.dense", "pooler"))),
    "classes": Head(
        ("classifier",),
        tuple(linear_mappings(f"{_HEAD}.out_proj", "classifier")),
        replaces_output=True,
    ),
    "spans": Head(
        ("span_head",), tuple(linear_mappings("qa_outputs", "span_head")), replaces_output=True
    ),
}
STACK_KEYS = {
    "encoder_layers": "n_layers",
    "d_model": "d_model",
    "decoder_attention_heads": "n_heads",
    "decoder_ffn_dim": "d_ff",
    "vocab_size": "vocab_size",
}
BART = Family(
    model_type="bart",
    model="encoder_decoder",
    classes={frozenset(): "BartForConditionalGeneration", **_TASKS},
    prefix="model.",
    base=_base,
    heads=HEADS,
    keys=STACK_KEYS | {"max_position_embeddings": "max_length"},
    fixed={
        "norm": "layernorm",
        "norm_placement": "post",
        "norm_eps": 1e-5,
        "embedding_norm": True,
        "separate_embeddings": True,
        "positions": "learned",
        "position_offset": OFFSET,
        "pooling": "shifted",
    },
    read=_read,
    write=_write,
    output="lm_head.weight",
    table="model.shared.weight",
    copies={
        _TOKENS.format("encoder"): "model.shared.weight",
        _TOKENS.format("decoder"): "model.shared.weight",
    },
    adapted=_with_tables,
    in_file=["tie_embeddings"],
    constants={"final_logits_bias": lambda c: np.zeros((1, c.vocab_size), np.float32)},
    objective="denoising",
)


def _mbart_base(config: TransformerConfig) -> list[TensorMapping]:
    stacks = ("encoder", "decoder")
    finals = [norm_mappings(f"model.{stack}.layer_norm", f"{stack}/final_norm") for stack in stacks]
    return [*_base(config), *(row for rows in finals for row in rows)]


MBART = replace(
    BART,
    model_type="mbart",
    classes={
        frozenset(): "MBartForConditionalGeneration",
        frozenset({"spans"}): "MBartForQuestionAnswering",
    },
    heads={"spans": HEADS["spans"]},
    base=_mbart_base,
    read=lambda hf: _read(hf) | {"start_id": -1},  # always the last token, the language
    fixed={**BART.fixed, "norm_placement": "pre"},
)
