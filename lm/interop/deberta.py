"""DeBERTa 2 and 3 (He et al. 2021, 2023), bare or with the heads of its classes.

In the releases of version 3 only attention has positions, and the layers' own projections are also
applied to the position table. The classes' default is a plain encoder with embedded positions. Some
have both, or embeddings of another width that are projected before they are normalized.
"""

from __future__ import annotations

from collections.abc import Collection

from lm.config.registries import DisentangledOptions
from lm.interop.activation_words import ACTIVATIONS
from lm.interop.bert import KEYS
from lm.interop.family import (
    Family,
    Head,
    UnsupportedConfig,
    Values,
    hf_word,
    lm_word,
    read_size,
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
from lm.models.positions import has_position_table
from lm.models.transformer_config import TransformerConfig

_LAYERS, _LAYER = "stack/layers", "deberta.encoder.layer.{}"
_TERMS = {frozenset(("c2p", "p2c")): "both", frozenset(()): "none"}
_TERMS |= {frozenset((x,)): x for x in ("c2p", "p2c")}
_HEAD, _CONV = "cls.predictions", "deberta.encoder.conv"
_CURVES = {"tanh": "tanh", **ACTIVATIONS}


def _base(config: TransformerConfig) -> list[TensorMapping]:
    embeddings, of_self = "deberta.embeddings", f"{_LAYER}.attention.self"
    attention = f"{_LAYERS}/attention"
    return [
        same_layout(f"{embeddings}.word_embeddings.weight", "tokens/embedding"),
        same_layout(f"{embeddings}.token_type_embeddings.weight", "types/embedding"),
        same_layout(f"{embeddings}.position_embeddings.weight", "positions/embedding"),
        *linear_mappings(f"{embeddings}.embed_proj", "embedding_projection"),
        *norm_mappings(f"{embeddings}.LayerNorm", "embedding_norm"),
        same_layout("deberta.encoder.rel_embeddings.weight", "stack/relative_table/embedding"),
        *norm_mappings("deberta.encoder.LayerNorm", "stack/relative_table/norm"),
        TensorMapping(f"{_CONV}.conv.weight", ("stack/convolution/kernel",), "O I K", "K I O"),
        same_layout(f"{_CONV}.conv.bias", "stack/convolution/bias"),
        *norm_mappings(f"{_CONV}.LayerNorm", "stack/convolution_norm"),
        *linear_mappings(f"{of_self}.query_proj", f"{attention}/query", "D", "H K"),
        *linear_mappings(f"{of_self}.key_proj", f"{attention}/key", "D", "H K"),
        *linear_mappings(f"{of_self}.value_proj", f"{attention}/value", "D", "H K"),
        *linear_mappings(f"{of_self}.pos_key_proj", f"{attention}/position_key", "D", "H K"),
        *linear_mappings(f"{of_self}.pos_query_proj", f"{attention}/position_query", "D", "H K"),
        *linear_mappings(f"{_LAYER}.attention.output.dense", f"{attention}/out", "H K", "D"),
        *norm_mappings(f"{_LAYER}.attention.output.LayerNorm", f"{_LAYERS}/attention_norm"),
        *linear_mappings(f"{_LAYER}.intermediate.dense", f"{_LAYERS}/feed_forward/in"),
        *linear_mappings(f"{_LAYER}.output.dense", f"{_LAYERS}/feed_forward/out"),
        *norm_mappings(f"{_LAYER}.output.LayerNorm", f"{_LAYERS}/feed_forward_norm"),
    ]


def _adapted(hf: Values, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors without the norm of a position table that the model does not have."""
    unused = () if hf.get("relative_attention") else ("weight", "bias")
    names = {f"deberta.encoder.LayerNorm.{name}" for name in unused}
    return {name: tensor for name, tensor in stored.items() if name not in names}


def _read(hf: Values) -> Values:
    width = read_size({"embedding_size": hf["hidden_size"]} | hf, "embedding_size")
    is_projected = width != hf["hidden_size"]
    require_equal(hf, conv_groups=1)
    conv = read_size({"conv_kernel_size": 0} | hf, "conv_kernel_size")
    if conv and conv % 2 == 0:
        raise UnsupportedConfig(f"config.json: conv_kernel_size={conv} is even")
    is_tied = hf.get("tie_word_embeddings", True) or not hf.get("legacy", True)
    kinds = hf.get("pos_att_type") or []
    kinds = kinds.lower().split("|") if isinstance(kinds, str) else kinds
    terms = frozenset(str(kind).strip() for kind in kinds) if isinstance(kinds, list) else kinds
    length = read_size(hf, "max_position_embeddings")
    positions = _read_relative if hf["relative_attention"] else _read_absolute
    return positions(hf, terms, length) | {
        "max_length": length,
        "embedding_size": width if is_projected else 0,
        "projection_first": is_projected,
        "activation": lm_word(hf, "hidden_act", ACTIVATIONS, "gelu"),
        "pooler_activation": lm_word(hf, "pooler_hidden_act", _CURVES, "gelu"),
        "first_conv": conv,
        "conv_activation": lm_word(hf, "conv_act", _CURVES, "tanh"),
        "norm_eps": hf.get("layer_norm_eps", 1e-7),
        "tie_embeddings": is_tied,
        "dropout": hf.get("hidden_dropout_prob", 0.1),
        "attention_dropout": hf.get("attention_probs_dropout_prob", 0.1),
    }


def _read_relative(hf: Values, terms: Collection[str], length: int) -> Values:
    """Read the table of positions and how attention uses it."""
    if terms not in _TERMS:
        raise UnsupportedConfig(
            f"config.json: pos_att_type={hf.get('pos_att_type')} is not supported, only c2p|p2c"
        )
    buckets, longest = hf.get("position_buckets", -1), hf.get("max_relative_positions", -1)
    longest = longest if longest > 0 else length
    n_rows, is_log = 2 * (buckets if buckets > 0 else longest), buckets > 0 and bool(terms)
    options = DisentangledOptions(
        relative_terms=_TERMS[terms],
        relative_input=bool(hf.get("position_biased_input")),
        relative_norm="layer_norm" in (hf.get("norm_rel_ebd") or "").lower(),
        relative_shared=bool(hf.get("share_att_key")),
        relative_log=is_log,
    )
    return {
        "mixer": "disentangled",
        "mixer_options": options,
        "positions": "disentangled",
        "relative_buckets": n_rows,
        "relative_max_distance": longest if is_log else n_rows,
    }


def _read_absolute(hf: Values, terms: Collection[str], length: int) -> Values:
    """Read positions that are embedded, or none; `terms` still divide the scores."""
    n_terms = 1 + ("c2p" in terms) + ("p2c" in terms)
    width = hf["hidden_size"] // max(1, hf["num_attention_heads"])
    return {
        "positions": "learned" if hf.get("position_biased_input") else "none",
        "attention_scale": (width * n_terms) ** -0.5 if n_terms > 1 else 0.0,
    }


def _write(config: TransformerConfig) -> Values:
    c = config
    is_relative = c.mixer == "disentangled"
    o = c.mixer_options if is_relative else DisentangledOptions(relative_norm=False)
    n_terms = round(c.score_scale**-2 / c.head_dim)
    by_number = {2: ["c2p"], 3: ["c2p", "p2c"]}
    terms = next(sorted(kinds) for kinds, name in _TERMS.items() if name == o.relative_terms)
    longest = c.relative_max_distance if o.relative_log else c.relative_buckets // 2
    return {
        "relative_attention": is_relative,
        "position_biased_input": has_position_table(c),
        "pos_att_type": terms if is_relative else by_number.get(n_terms),
        "share_att_key": o.relative_shared,
        "norm_rel_ebd": "layer_norm" if o.relative_norm else "none",
        "position_buckets": c.relative_buckets // 2 if is_relative and o.relative_log else -1,
        "max_relative_positions": longest if is_relative else -1,
        "max_position_embeddings": c.max_length,
        "embedding_size": c.embedding_size or c.d_model,
        "hidden_act": hf_word(c.activation, ACTIVATIONS, "activation"),
        "pooler_hidden_act": hf_word(c.pooler_activation, _CURVES, "pooler_activation"),
        "conv_kernel_size": c.first_conv,
        "conv_act": hf_word(c.conv_activation, _CURVES, "conv_activation"),
        "pooler_hidden_size": c.d_model,
        "layer_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.attention_dropout,
    }


DEBERTA = Family(
    model_type="deberta-v2",
    model="encoder",
    classes={
        frozenset({"masked"}): "DebertaV2ForMaskedLM",
        frozenset({"pooler", "classes"}): "DebertaV2ForSequenceClassification",
        frozenset({"classes"}): "DebertaV2ForTokenClassification",
        frozenset({"spans"}): "DebertaV2ForQuestionAnswering",
        frozenset(): "DebertaV2Model",
    },
    prefix="deberta.",
    base=_base,
    heads={
        "masked": Head(
            ("transform", "transform_norm", "logit_bias", "head"),
            (
                *linear_mappings(f"{_HEAD}.transform.dense", "transform"),
                *norm_mappings(f"{_HEAD}.transform.LayerNorm", "transform_norm"),
                same_layout(f"{_HEAD}.bias", "logit_bias/bias"),
                output_mapping(f"{_HEAD}.decoder.weight"),
            ),
        ),
        "pooler": Head(("pooler",), tuple(linear_mappings("pooler.dense", "pooler"))),
        "classes": Head(("classifier",), tuple(linear_mappings("classifier", "classifier"))),
        "spans": Head(("span_head",), tuple(linear_mappings("qa_outputs", "span_head"))),
    },
    keys=KEYS,
    fixed={
        "norm": "layernorm",
        "norm_placement": "post",
        "embedding_norm": True,
    },
    read=_read,
    write=_write,
    output=f"{_HEAD}.decoder.weight",
    table="deberta.embeddings.word_embeddings.weight",
    copies={f"{_HEAD}.decoder.bias": f"{_HEAD}.bias"},
    # Names under `legacy=false`.
    renamed={
        rf"^lm_predictions\.lm_head\.{name}": f"{_HEAD}.{new}"
        for name, new in (
            ("dense", "transform.dense"),
            ("LayerNorm", "transform.LayerNorm"),
            ("bias", "bias"),
        )
    },
    adapted=_adapted,
    left_out=["generator", "replaced_transform", "replaced_head"],
)
