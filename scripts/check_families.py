"""Import random models of every Hugging Face family: equal to transformers, or one-line errors.

    python scripts/check_families.py [--cases 200] [--seed 0] [--workdir DIR] [--only NAME]

Each case draws every field of a family's configuration class, a class with a head, random weights,
a dtype, a number of files, and a spelling of config.json (default values left out, RoPE under its
older keys). `lm import` reads the folder. Outputs and greedy tokens are compared with those of
`transformers`, and the output of `lm export` with the original, byte by byte. It prints one line
per case: equal, refused (with the message that the user sees), or WRONG; then the counts. The exit
code is 1 if a case is wrong.
"""

# ruff: noqa: E402  JAX reads its variables when it is imported

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import os
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"

import jax
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from lm.decoding.controls import Controls
from lm.decoding.sampling import Sampling, sample_steps
from lm.errors import UserError
from lm.interop.import_export import read_to_export
from lm.interop.model_folder import FAMILIES
from lm.models.variables import as_variables

OTHERS = ("kimi_k2", "whisper")  # another name of DeepSeek-V3; a model that hears
TOLERANCE = 1e-4  # of the largest number of an output
LENGTHS = np.array([23, 11, 1])
N_NEW = 8
LOCAL, GLOBAL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"

# --- configurations


def size(low, high):
    return lambda rng, values: rng.randint(low, high)


def one_of(*options):
    return lambda rng, values: rng.choice(options)


def mostly(*options, part=0.9):
    """The first option, or one of the others, which few models have."""
    return lambda rng, values: options[0] if rng.random() < part else rng.choice(options[1:])


def number(low, high):
    return lambda rng, values: math.exp(rng.uniform(math.log(low), math.log(high)))


def kv_heads(rng, values):
    n = values["num_attention_heads"]
    return rng.choice([k for k in range(1, n + 1) if n % k == 0])


def width(rng, values):
    """A width that the heads divide, which many classes demand."""
    heads = next(values[key] for key in HEADS if key in values)
    return heads * 2 * rng.randint(2, 7)


def subset(rng, n):
    """Numbers of layers: each n-th, those after some, or any."""
    every, first = rng.randint(1, 3), rng.randint(0, n)
    return rng.choice(
        [
            list(range(every - 1, n, every)),
            list(range(first, n)),
            [i for i in range(n) if rng.random() < 0.5],
        ]
    )


def layer_kinds(*kinds):
    def draw(rng, values):
        n = values["num_hidden_layers"]
        chosen = set(subset(rng, n))
        return [kinds[i in chosen] for i in range(n)]

    return draw


def rope(rng, values, kinds=("default", "linear", "dynamic", "yarn", "llama3", "longrope")):
    """A value of `rope_parameters`; what may lack lacks half of the time."""
    kind = rng.choice(kinds)
    head = values.get("qk_rope_head_dim") or values.get("head_dim")
    head = head or values["hidden_size"] // values["num_attention_heads"]
    found = {"rope_type": kind}
    if values.get("partial_rotary_factor"):
        found["partial_rotary_factor"] = values["partial_rotary_factor"]
    n = int(head * found.get("partial_rotary_factor", 1.0)) // 2
    factors = [round(1 + rng.random() * i, 3) for i in range(n)]
    original = {"original_max_position_embeddings": rng.randint(8, 40)}
    always = {
        "default": {},
        "linear": {"factor": rng.uniform(1, 9)},
        "dynamic": {"factor": rng.uniform(1, 9)},
        "yarn": {"factor": rng.uniform(1, 9)} | original,
        "llama3": {"factor": rng.uniform(1, 9), "low_freq_factor": rng.uniform(0.5, 1.5)}
        | {"high_freq_factor": rng.uniform(2, 5)}
        | original,
        "longrope": {"short_factor": factors, "long_factor": [2 * f for f in factors]} | original,
    }[kind]
    scale = {"attention_factor": rng.uniform(0.5, 2)}
    perhaps = {"rope_theta": rng.choice([500.0, 10_000, 1e6])} | {
        "yarn": {"beta_fast": rng.uniform(2, 40), "beta_slow": rng.uniform(0.2, 1.5)}
        | {"truncate": rng.random() < 0.5, "mscale": rng.uniform(0.5, 2)}
        | {"mscale_all_dim": rng.uniform(0.5, 2)}
        | (scale if rng.random() < 0.5 else {}),
        "longrope": {"factor": rng.uniform(1, 9)} | scale,
    }.get(kind, {})
    return found | always | {key: x for key, x in perhaps.items() if rng.random() < 0.5}


def layer_rope(rng, values):
    near = ("default",) if rng.random() < 0.9 else ("linear", "yarn")
    return {GLOBAL: rope(rng, values), LOCAL: rope(rng, values, near)}


def special_id(rng, values):
    return rng.choice([None, 0, 1, rng.randrange(values["vocab_size"])])


HEADS = ("num_attention_heads", "n_head", "encoder_attention_heads", "num_heads")
ANY_ACTIVATION = one_of("gelu", "gelu_new", "relu", "gelu_pytorch_tanh", "silu", "gelu_fast")
# How each field is drawn, by its name; in this order, since some follow from others.
FIELDS = {
    "vocab_size": size(61, 131),
    "num_attention_heads": size(1, 6),
    "n_head": size(1, 6),
    "encoder_attention_heads": size(1, 6),
    "decoder_attention_heads": lambda rng, v: rng.choice([v["encoder_attention_heads"], 1, 2]),
    "num_heads": size(1, 6),
    "num_hidden_layers": size(1, 6),
    "n_layer": size(1, 4),
    "encoder_layers": size(1, 3),
    "decoder_layers": size(1, 3),
    "num_layers": size(1, 3),
    "num_decoder_layers": size(1, 3),
    "num_key_value_heads": kv_heads,
    "hidden_size": width,
    "n_embd": width,
    "d_model": width,
    "embedding_size": lambda rng, v: rng.choice([v["hidden_size"], rng.randint(5, 40)]),
    "head_dim": lambda rng, v: 2 * rng.randint(2, 9),
    "d_kv": size(3, 12),
    **dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "n_inner"), size(7, 60)),
    "decoder_ffn_dim": lambda rng, v: rng.choice([v["encoder_ffn_dim"], rng.randint(7, 60)]),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), size(5, 40)),
    "intermediate_size_mlp": size(7, 60),
    "max_position_embeddings": size(32, 70),
    "n_positions": size(32, 70),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), special_id),
    **dict.fromkeys(("cls_token_id", "sep_token_id", "decoder_start_token_id"), special_id),
    "forced_eos_token_id": special_id,
    "type_vocab_size": size(1, 4),
    **dict.fromkeys(
        ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), number(1e-9, 1e-2)
    ),
    "hidden_act": one_of("silu", "silu", "gelu", "gelu_new", "relu", "swish"),
    "hidden_activation": one_of("gelu_pytorch_tanh", "gelu", "silu", "relu"),
    "activation_function": ANY_ACTIVATION,
    "sliding_window": size(1, 30),
    "layer_types": layer_kinds(LOCAL, GLOBAL),
    "max_window_layers": size(0, 6),
    "query_pre_attn_scalar": size(3, 40),
    "final_logit_softcapping": number(1, 30),
    "attn_logit_softcapping": number(1, 30),
    "partial_rotary_factor": one_of(0.25, 0.5, 0.6, 1.0),
    "rope_parameters": rope,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), size(1, 8)),
    "num_experts_per_tok": lambda rng, v: rng.randint(1, experts_of(v)),
    "decoder_sparse_step": size(1, 3),
    "mlp_only_layers": lambda rng, v: subset(rng, v["num_hidden_layers"]),
    "router_jitter_noise": one_of(0.0, 0.1),
    "first_k_dense_replace": size(0, 4),
    "n_shared_experts": size(1, 3),
    "kv_lora_rank": size(4, 12),
    "q_lora_rank": size(4, 12),
    "qk_nope_head_dim": size(2, 9),
    "qk_rope_head_dim": lambda rng, v: 2 * rng.randint(1, 5),
    "v_head_dim": size(2, 14),
    "n_group": lambda rng, v: rng.choice(
        [n for n in range(1, experts_of(v) + 1) if experts_of(v) % n == 0]
    ),
    "topk_group": lambda rng, v: rng.randint(1, v.get("n_group") or 1),
    "topk_method": one_of("greedy", "group_limited_greedy"),
    "routed_scaling_factor": number(0.5, 8),
    "clip_qkv": mostly(None, 0.5),
    "swiglu_alpha": mostly(1.702, 1.3),
    "swiglu_limit": mostly(7.0, 1.0),
    **dict.fromkeys(
        ("embedding_multiplier", "logits_scaling", "residual_multiplier"), number(0.2, 8)
    ),
    "attention_multiplier": number(0.05, 2),
    "original_max_position_embeddings": size(8, 40),
    "interleave_moe_layer_step": size(1, 3),
    "moe_layers": lambda rng, v: subset(rng, v["num_hidden_layers"]),
    "no_rope_layers": lambda rng, v: [
        int(i in set(subset(rng, v["num_hidden_layers"]))) for i in range(v["num_hidden_layers"])
    ],
    "no_rope_layer_interval": size(1, 5),
    "attention_chunk_size": size(2, 30),
    "floor_scale": size(2, 9),
    "attn_scale": number(0.05, 1),
    "relative_attention_num_buckets": lambda rng, v: 2 * rng.randint(2, 10),
    "relative_attention_max_distance": size(12, 40),
    "feed_forward_proj": one_of("relu", "gated-gelu", "gated-silu", "gelu", "gelu_new", "silu"),
    "position_buckets": lambda rng, v: rng.choice([-1, rng.randint(4, 16)]),
    "relative_attention": one_of(True, True, False),
    "legacy": one_of(True),  # a head that has other names otherwise is exported under these
    "max_relative_positions": one_of(-1, 9, 30),
    "norm_rel_ebd": one_of("layer_norm", "none"),
    "share_att_key": one_of(True, False),
    "pos_att_type": one_of("p2c|c2p", ["c2p", "p2c"], "c2p", ["p2c"], None),
    "position_biased_input": one_of(True, False),
    "pooler_hidden_act": mostly("gelu", "tanh", "relu", part=0.6),
    "conv_kernel_size": one_of(0, 0, 3, 1, 5),
    "conv_act": one_of("tanh", "gelu", "relu"),
    "local_attention": lambda rng, v: 2 * rng.randint(1, 12),
    "global_attn_every_n_layers": size(1, 4),
    "decoder_bias": mostly(True, False),
    "classifier_pooling": one_of("cls", "mean"),
    "classifier_activation": one_of("gelu", "relu", "silu"),
    "expand": size(1, 3),
    "state_size": size(2, 9),
    "n_groups": lambda rng, v: rng.choice(
        [n for n in range(1, v["num_heads"] + 1) if v["num_heads"] % n == 0]
    ),
    **dict.fromkeys(("conv_kernel", "mamba_d_conv"), size(2, 5)),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), one_of(2, 4, 8, 16, 256)),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), size(2, 9)),
    "linear_num_key_heads": size(1, 4),
    "linear_num_value_heads": lambda rng, v: v["linear_num_key_heads"] * rng.randint(1, 3),
    "linear_conv_kernel_dim": size(1, 5),
    **dict.fromkeys(("use_bias", "mamba_proj_bias"), mostly(False, True)),
    **dict.fromkeys(("use_conv_bias", "mamba_conv_bias"), mostly(True, False)),
    "time_step_limit": mostly((0.0, math.inf), (0.01, 0.2)),
    "attn_layer_indices": lambda rng, v: subset(rng, v["num_hidden_layers"]),
    "mamba_n_groups": size(1, 2),
    "mamba_d_state": size(2, 9),
    "mamba_expand": size(1, 2),
    "is_decoder": mostly(False, True),
    "add_cross_attention": mostly(False, True),
    "scale_attn_by_inverse_layer_idx": mostly(False, True),
    "use_bidirectional_attention": mostly(False, None, True),
    **dict.fromkeys(("use_parallel_residual", "qk_layernorm"), one_of(False, True)),
    "num_labels": size(1, 5),
}


def experts_of(values):
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((values[key] for key in keys if key in values), 1)


# Fields that no output depends on.
SILENT = {
    *("initializer_range", "initializer_factor", "init_std", "use_cache", "router_aux_loss_coef"),
    *("output_router_logits", "pretraining_tp", "initializer_cutoff_factor", "summary_type"),
    *("summary_use_proj", "summary_activation", "summary_proj_to_labels", "sparse_prediction"),
    *("sparse_pred_ignore_index", "deterministic_flash_attn", "encoder_layerdrop"),
    *("decoder_layerdrop", "num_mtp_layers", "num_logits_to_keep", "z_loss_coefficient"),
    *("time_step_rank", "time_step_min", "time_step_max", "time_step_floor", "residual_in_fp32"),
    *("rescale_prenorm_residual", "reorder_and_upcast_attn"),
}
BERT_ACTIVATION = {"hidden_act": one_of("gelu", "gelu_new", "relu", "silu")}
ROTATED_PART = {"partial_rotary_factor": FIELDS["partial_rotary_factor"]}
DEEPSEEK = {"head_dim": None}
DEEPSEEK["num_key_value_heads"] = lambda rng, v: rng.choice([v["num_attention_heads"], 128])
# Fields by family that are drawn otherwise, or that the class does not declare; None: left out.
OF_FAMILY = {
    "gemma": {"hidden_act": FIELDS["hidden_activation"]},
    "gemma3_text": {"rope_parameters": layer_rope},
    "olmo3": {"rope_parameters": layer_rope},
    "modernbert": {
        "rope_parameters": layer_rope,
        "hidden_activation": one_of("gelu", "silu", "relu", "gelu_new"),
    },
    **dict.fromkeys(("bert", "roberta", "electra"), BERT_ACTIVATION),
    "deberta-v2": BERT_ACTIVATION
    | {key: FIELDS[key] for key in ("position_buckets", "norm_rel_ebd", "share_att_key")}
    | {"conv_kernel_size": FIELDS["conv_kernel_size"], "conv_act": FIELDS["conv_act"]}
    | {"embedding_size": FIELDS["embedding_size"]}
    | {"type_vocab_size": size(0, 3)},
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "bart": {"decoder_start_token_id": lambda rng, v: v.get("eos_token_id", 2)},
    "llama4_text": {"layer_types": layer_kinds(CHUNKED, GLOBAL)},
    **dict.fromkeys(("phi3", "stablelm"), ROTATED_PART),
    "qwen3_next": ROTATED_PART
    | {"layer_types": layer_kinds("linear_attention", GLOBAL)}
    | {"full_attention_interval": size(1, 5)},
    "bamba": {
        "mamba_n_heads": lambda rng, v: (v["mamba_expand"] or 2) * v["num_attention_heads"],
        "mamba_d_head": lambda rng, v: v["hidden_size"] // v["num_attention_heads"],
    },
    "mamba2": {
        "hidden_size": lambda rng, v: v["num_heads"] * 2 * rng.randint(2, 6),
        "head_dim": lambda rng, v: (v["expand"] or 2) * v["hidden_size"] // v["num_heads"],
    },
}
DROPPED = {f"deberta.encoder.LayerNorm.{name}" for name in ("weight", "bias")}
OPTIONAL = 0.25  # part of the fields that are left at their default, and of those that are null
COSTLY = {"hidden_size", "d_model", "n_embd", "vocab_size", "num_hidden_layers", "n_layer"}
COSTLY |= {"num_experts", "n_routed_experts", "num_local_experts"}


def draw_values(family, config_class, rng):
    """Return a configuration of a family: a value for each field, few left at their defaults."""
    own = {f.name: f for f in dataclasses.fields(config_class)}
    base = {f.name for f in dataclasses.fields(transformers.PreTrainedConfig)}
    names = [name for name in own if name not in base - {"tie_word_embeddings"} - SILENT]
    names += ["num_labels"]
    how = FIELDS | OF_FAMILY.get(family, {})
    names += [name for name in OF_FAMILY.get(family, {}) if name not in names]
    order = {name: i for i, name in enumerate(how)}
    values = collections.ChainMap({}, {name: f.default for name, f in own.items()})
    for name in sorted(names, key=lambda name: order.get(name, len(order))):
        draw = how.get(name)
        kind = str(own[name].type) if name in own else ""
        if name in SILENT or (name in how and draw is None):
            continue
        if draw is None and ("dropout" in name or "pdrop" in name):
            draw = one_of(0.0, 0.1, 0.3)
        if draw is None and (name == "tie_word_embeddings" or "bool" in kind):
            draw = one_of(False, True)
        if draw is None:
            raise SystemExit(f"{config_class.__name__}.{name} is not drawn: add it to FIELDS")
        if name not in COSTLY and rng.random() < OPTIONAL / 2:
            continue
        is_null = (
            "None" in kind
            and name not in COSTLY
            and name not in HEADS
            and rng.random() < OPTIONAL / 2
        )
        values[name] = None if is_null else draw(rng, values)
    return values.maps[0]


AUTO = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "PRETRAINING", "SEQUENCE_CLASSIFICATION")
AUTO += ("TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "NEXT_SENTENCE_PREDICTION", "TEXT_ENCODING")


def classes_of(family):
    """Return the class that the family is most used with, and the others of transformers."""
    found = []
    for task in AUTO[FAMILIES[family].model != "decoder" :]:
        name = getattr(transformers, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).get(family)
        mapping = transformers.models.auto.modeling_auto
        name = name or getattr(mapping, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).get(family)
        found += [name] if name and name not in found else []
    if family == "gemma3_text":
        found = ["Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"]
    return [found[0]] * 2 * len(found) + found


# --- weights


def fill(model, rng):
    """Draw every parameter, so that none is at a value that hides it."""
    draw = torch.Generator().manual_seed(rng.randrange(2**31))

    def normal(x, deviation):
        return torch.randn(x.shape, generator=draw) * deviation

    biases = {name: x for name, x in model.named_parameters() if name.endswith("decoder.bias")}
    with torch.no_grad():
        for name, x in reversed([*model.named_parameters()]):
            if x.ndim < 2:
                around = 1.0 if torch.all(x == 1) else 0.0
                x.copy_(normal(x, 0.3) + around)
            else:
                x.copy_(normal(x, 0.5 if "embed" in name or "wte" in name else x.shape[-1] ** -0.5))
            twin = name.replace(".bias", ".decoder.bias")
            if twin in biases:  # of two biases of an untied output one is in use
                x.copy_(biases[twin])
            if name.endswith("A_log"):
                x.copy_(normal(x, 0.5))
        for name, x in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                x.copy_(normal(x, 0.2))


def build(class_name, values):
    """Return a model, with an output matrix of its own in half of the encoder–decoders."""
    kind = getattr(transformers, class_name)
    config = kind.config_class(**json.loads(json.dumps(values)))
    return kind(config).eval()


def respell(folder, rng):
    """Change config.json in ways that leave the configuration as `transformers` reads it."""
    file = folder / "config.json"
    stated = json.loads(file.read_text())

    def read():
        found = transformers.AutoConfig.from_pretrained(folder).to_dict()
        return json.dumps({k: v for k, v in found.items() if k != "_name_or_path"}, sort_keys=True)

    def attempt(changed):
        file.write_text(json.dumps(changed))
        try:
            return read() == before
        except Exception:
            return False

    before = read()
    for name in sorted(stated):
        if name not in ("model_type", "architectures") and rng.random() < 0.5:
            fewer = {key: value for key, value in stated.items() if key != name}
            stated = fewer if attempt(fewer) else stated
    rope = stated.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope and rng.random() < 0.5:
        older = {k: v for k, v in stated.items() if k != "rope_parameters"}
        older["rope_theta"] = rope["rope_theta"]
        kind = rope.get("rope_type", "default")
        scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type")}
        if "partial_rotary_factor" in scaling:
            older["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
        if kind != "default":
            older["rope_scaling"] = {rng.choice(["type", "rope_type"]): kind} | scaling
        stated = older if attempt(older) else stated
    file.write_text(json.dumps(stated))


# --- outputs


def their_output(model, inputs):
    with torch.no_grad():
        out = model(**{key: torch.tensor(x) for key, x in inputs.items()})
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], -1).numpy()
    for name in ("prediction_logits", "seq_relationship_logits", "logits", "pooler_output"):
        if out.get(name) is not None:
            return out[name].numpy()
    return out.last_hidden_state.numpy()


def whole_input(model, ids):
    """Return the inputs of a forward pass."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    if "ForConditional" in type(model).__name__:
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": np.append(ids, [[model.config.eos_token_id]] * len(ids), axis=1)}


def our_output(model, class_name, tokens, segments, types, target):
    """Return what our model computes where `their_output` has that of a class."""
    if target is not None:
        return model(tokens, target, segments)
    if class_name.endswith(("LMHeadModel", "ForCausalLM", "ForMaskedLM", "BertForPreTraining")):
        return model(tokens, None, segments, *types)
    hidden = model.hidden(tokens, None, segments, *types)
    if class_name.endswith("ForSequenceClassification"):
        return model.classify(model.pooled(hidden, segments))
    if class_name.endswith("ForNextSentencePrediction"):
        return model.next_sentence(model.pooled(hidden, segments))
    if class_name.endswith("ForTokenClassification"):
        return model.classify(hidden)
    if class_name.endswith("ForQuestionAnswering"):
        return model.spans(hidden)
    if class_name.endswith("Model"):
        return model.pooled(hidden, segments) if "pooler" in model.variables["params"] else hidden
    return model.replaced(hidden)


def compare(run, theirs, class_name, rng):
    """Return how outputs or greedy tokens differ; None if they do not."""
    config = theirs.config
    pad = config.pad_token_id
    ids = [i for i in range(config.vocab_size) if i != pad]
    draw = np.random.default_rng(rng.randrange(2**31))
    tokens = draw.choice(ids, (len(LENGTHS), LENGTHS[0]))
    segments = (np.arange(LENGTHS[0]) < LENGTHS[:, None]).astype(np.int32)
    tokens = np.where(segments, tokens, pad or 0)
    is_pair = class_name.endswith("ForConditionalGeneration")
    if config.is_encoder_decoder and not is_pair:  # texts to classify end with one token
        tokens = np.where(tokens == config.eos_token_id, ids[0], tokens)
        tokens[np.arange(len(LENGTHS)), LENGTHS - 1] = config.eos_token_id
    target = draw.choice(ids, (len(LENGTHS), 9)) if is_pair else None
    n_types = getattr(config, "type_vocab_size", 0) if hasattr(run.model, "next_sentence") else 0
    types = draw.integers(0, n_types, tokens.shape) if n_types else None
    own = () if types is None else (types,)

    def compute(model):
        return our_output(model, class_name, tokens, segments, own, target)

    forward = jax.jit(lambda variables: run.model.apply(variables, method=compute))
    found = np.asarray(forward(as_variables(run.params)))
    is_whole = found.shape[1] != LENGTHS[0]
    for row, n in enumerate(LENGTHS):
        inputs = {"input_ids": tokens[row : row + 1, :n]}
        inputs |= {"decoder_input_ids": target[row : row + 1]} if is_pair else {}
        inputs |= {"token_type_ids": types[row : row + 1, :n]} if n_types else {}
        reset(theirs)
        expected = their_output(theirs, inputs)
        ours = found[row : row + 1] if is_whole else found[row : row + 1, :n]
        if ours.shape != expected.shape:
            return f"shape {ours.shape} instead of {expected.shape}"
        off = np.abs(ours - expected).max() / np.abs(expected).max()
        if not off < TOLERANCE:
            return f"output of row {row} off by {off:.1e} of the largest"
    if class_name.endswith(("LMHeadModel", "ForCausalLM")):
        return compare_greedy(run, theirs, tokens[:1, : rng.choice([5, 15])])
    return None


def compare_greedy(run, theirs, prompt):
    reset(theirs)
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "forced_eos_token_id"):
        setattr(theirs.generation_config, name, None)
    with torch.no_grad():
        ones = torch.ones(prompt.shape, dtype=torch.long)
        found = theirs.generate(
            torch.tensor(prompt),
            attention_mask=ones,
            max_new_tokens=N_NEW,
            do_sample=False,
            use_cache=has_right_cache(theirs.config),
        )
    expected = found[0, prompt.shape[1] :].tolist()
    options = Sampling(temperature=0), 0, Controls()
    steps = sample_steps(run.model, run.params, prompt, N_NEW, *options)
    ours = [int(np.asarray(ids)[0]) for ids in steps]
    return None if ours == expected else f"greedy tokens {ours} instead of {expected}"


def has_right_cache(config):
    """Return whether the cached steps of transformers 5.23 equal its pass over the whole text.

    Its cache keeps all tokens, not none, for a window of 1, and its cached steps of Mamba-2 do not
    limit step sizes.
    """
    limits = tuple(getattr(config, "time_step_limit", None) or (0.0, math.inf))
    return limits == (0.0, math.inf) and getattr(config, "sliding_window", None) != 1


def reset(model):
    """Let RoPE that follows the longest text forget it."""
    if "rope_parameters" in model.config.to_dict():
        with torch.no_grad():
            model(torch.tensor([[4]]))


def exported_tensors(folder):
    return {k: x for f in sorted(folder.glob("*.safetensors")) for k, x in load_file(f).items()}


def compare_export(run, folder, out, theirs, dtype):
    """Return how the export differs from what was imported."""
    before, after = exported_tensors(folder), exported_tensors(out)
    again = json.loads((out / "config.json").read_text())
    kind = getattr(transformers, again["architectures"][0])
    model, loading = kind.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    if any(loading[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return f"export: {kind.__name__} lacks or has too much: {loading}"[:300]
    ids = np.array([[5, 4, 7, 9, 5, 8, 12, 30, 2]])
    inputs = whole_input(theirs, ids)
    reset(theirs), reset(model.eval())
    expected, found = their_output(theirs, inputs), their_output(model.eval(), inputs)
    if not np.abs(expected - found).max() <= 1e-5 * np.abs(expected).max():
        return f"export: {kind.__name__} computes other numbers"
    if kind is not type(theirs):
        return f"note: exported as {kind.__name__}"
    if before.keys() - after.keys() == DROPPED:
        return "note: a norm without a table of positions is left out"
    if before.keys() != after.keys():
        return f"export: other tensors: {sorted(before.keys() ^ after.keys())}"[:300]
    if getattr(theirs.config, "scale_attn_by_inverse_layer_idx", False):
        return "note: the queries are written with the scale of their layer"
    is_apart = theirs.config.is_encoder_decoder and not theirs.config.tie_word_embeddings
    for name in before.keys() - ({"model.shared.weight"} if is_apart else set()):  # not in use
        if before[name].tobytes() != after[name].tobytes():
            return f"export: {name} differs"
    return None


def check(family, place, rng):
    """Return (class name, outcome) of one case."""
    while True:
        class_name = rng.choice(classes_of(family))
        kind = getattr(transformers, class_name)
        values = draw_values(family, kind.config_class, rng)
        dtype = rng.choice(["float32", "float32", "bfloat16"])
        folder, run, out = (place / name for name in ("in", "run", "out"))
        try:
            model = build(class_name, values)
            fill(model, rng)
            parts = {"max_shard_size": "10KB"} if rng.random() < 0.3 else {}
            model.to(getattr(torch, dtype)).save_pretrained(folder, **parts)
            respell(folder, rng)
            theirs = kind.from_pretrained(folder, dtype=torch.float32).eval()
            reset(theirs)
            their_output(theirs, whole_input(theirs, np.full((1, 23), 5)))
            break
        except Exception:
            if os.environ.get("SHOW_REFUSED"):
                traceback.print_exc()
            shutil.rmtree(folder, ignore_errors=True)
    print(f"   {class_name} {dtype} {(folder / 'config.json').read_text()}", flush=True)
    return class_name, outcome(class_name, theirs, folder, run, out, dtype, rng)


def outcome(class_name, theirs, folder, run, out, dtype, rng):
    from lm.interop.import_export import export_run, import_run

    try:
        import_run(folder, run, {}, lambda line: None)
    except UserError as error:
        return "refused: " + str(error).replace(str(folder), "DIR")
    except Exception as error:
        return f"WRONG {type(error).__name__}: {error}\n{traceback.format_exc()}"
    try:
        read = read_to_export(run, 1, False, lambda line: None)
        if problem := compare(read, theirs, class_name, rng):
            return f"WRONG {problem}"
        export_run(run, out, 1, False, dtype, lambda line: None)
        problem = compare_export(read, folder, out, theirs, dtype)
    except Exception as error:
        return f"WRONG {type(error).__name__}: {error}\n{traceback.format_exc()}"
    if problem:
        return problem if problem.startswith("note") else f"WRONG {problem}"
    return "equal"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    jax.config.update("jax_threefry_partitionable", True)
    place = args.workdir or Path(tempfile.mkdtemp())
    names = [name for name in FAMILIES if args.only in name and name not in OTHERS]
    counts = collections.defaultdict(collections.Counter)
    for i in range(args.cases):
        family, seed = names[i % len(names)], args.seed + i // len(names)
        home = place / f"{family}.{seed}"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        class_name, found = check(family, home, random.Random(f"{family} {seed}"))
        print(f"{family}.{seed} {class_name}: {found}", flush=True)
        kind = found.split()[0].strip(":")
        counts[family][kind] += 1
        if kind != "WRONG":
            shutil.rmtree(home)
        jax.clear_caches()
    for family, found in counts.items():
        print(f"{family}: {dict(found)}")
    return int(any("WRONG" in found for found in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
