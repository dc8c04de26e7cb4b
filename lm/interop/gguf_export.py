"""Export of a run as a GGUF file, for llama.cpp and programs built on it.

Tensors are those of the Hugging Face export, with the names of the package `gguf`. llama.cpp
rotates neighboring dimensions of a head in Llama's architecture, so query and key projections
are permuted. It adds nothing to the scales of Gemma's norms, and expects linear layers [out, in].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lm.errors import UserError, missing_package
from lm.interop.gguf_tokenizer import write_gguf_tokenizer
from lm.interop.huggingface import HuggingFaceModel, convert
from lm.interop.import_export import read_to_export
from lm.models.rotary import rope_scaling
from lm.models.transformer_config import TransformerConfig
from lm.runs.checkpoints import Log
from lm.runs.saved_params import require_empty

MODEL = "model.gguf"
ARCHITECTURES = {  # llama.cpp's, by model_type
    **dict.fromkeys(("llama", "mistral", "mixtral"), "llama"),
    **{"gpt2": "gpt2", "qwen2": "qwen2", "qwen3": "qwen3"},
    **{"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3"},
}
_FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
_FILE_TYPES["q8_0"] = "MOSTLY_Q8_0"
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_WITH_WINDOWS = ("gemma2", "gemma3")
# Numbers of layers for which llama.cpp scales attention by d_model / n_heads (its LLM_TYPE_27B).
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


def export_gguf(workdir: Path, to: Path, average: int, best: bool, dtype: str, log: Log) -> None:
    """Write a run as a folder with one GGUF file, tokenizer and chat template included.

    Args:
        workdir: folder of the run.
        to: output folder, empty or not yet existing.
        average: number of newest checkpoints whose parameters are averaged.
        best: export the checkpoint that `--config.eval.best` kept.
        dtype: type of matrices: float32, bfloat16, float16 or q8_0; vectors are float32.
        log: receives the lines for the user.

    Raises:
        UserError: `to` is not empty, or llama.cpp would compute or encode differently.
    """
    require_empty(to)
    if find_spec("gguf") is None:
        raise missing_package("lm export --format gguf", "gguf", "gguf")
    import gguf

    run = read_to_export(workdir, average, best, log)
    model = convert(run.model, run.params, run.model_type)
    name = ARCHITECTURES.get(model.family.model_type)
    if name is None or model.has_classes:
        raise UserError(
            f"GGUF export does not support {model.class_name}, only language models of "
            f"{', '.join(ARCHITECTURES)}"
        )
    for problem in _problems(name, model.config):
        raise UserError(f"llama.cpp's {name} cannot compute this model: {problem}")
    writer = gguf.GGUFWriter(None, name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_name(workdir.name)
    _write_settings(writer, name, model.config)
    write_gguf_tokenizer(writer, run.tokenizer, model.config.vocab_size, log)
    for tensor, values in gguf_tensors(name, model):
        kind = gguf.GGMLQuantizationType[_kind(tensor, values, dtype)]
        writer.add_tensor(tensor, gguf.quants.quantize(values, kind), raw_dtype=kind)
    to.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file(to / MODEL)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    log(f"{to / MODEL}: {name} of step {run.steps}, in {dtype}")


def _kind(name: str, values: np.ndarray, dtype: str) -> str:
    """Return the storage type of a tensor, chosen as in llama.cpp's own conversion."""
    if values.ndim < 2 or name.startswith("position_embd") or "ffn_gate_inp" in name:
        return "F32"
    if dtype == "q8_0" and values.shape[-1] % 32:
        return "F16"  # rows that are not a multiple of the block size
    return _TYPES[dtype]


def _problems(name: str, config: TransformerConfig) -> Iterator[str]:
    """Yield settings that llama.cpp's architecture does not support, as "model.key=value"."""
    c = config
    scale = c.head_dim**-0.5
    if c.n_layers == _SCALED_BY_WIDTH.get(name):
        scale = (c.d_model // c.n_heads) ** -0.5
    if abs(c.score_scale / scale - 1) > 1e-6:
        yield f"model.attention_scale={c.score_scale:.6g}, only {scale:.6g}"
    if name in ("gpt2", "qwen2") and c.head_dim * c.n_heads != c.d_model:
        yield f"model.head_dim={c.head_dim}, only d_model / n_heads"
    if name == "gpt2" and c.activation != "gelu_tanh":
        yield f"model.activation={c.activation}, only gelu_tanh"
    if c.window and name not in _WITH_WINDOWS and c.window < c.max_length:
        yield f"model.window={c.window}"
    if name in ("gemma", "gemma2") and not c.tie_embeddings:
        yield "model.tie_embeddings=False"
    if name == "gemma2" and not (c.attention_softcap and c.logit_softcap and c.window):
        yield "no soft-caps or no windows"
    if name not in ("llama", "gpt2", "qwen2") and (c.bias or "query" in c.attention_biases):
        yield f"model.attention_bias={c.attention_bias}"
    if c.positions == "rotary" and c.rope_scaling not in ("none", "linear", "llama3", "yarn"):
        yield f"model.rope_scaling={c.rope_scaling}"
    if c.rope_scaling == "llama3" and name != "llama":
        yield f"model.rope_scaling={c.rope_scaling}"
    if c.rope_scaling == "yarn" and (c.rope_attention_factor or not c.rope_truncate):
        yield "an attention factor of YaRN of its own, or rope_truncate=False"
    if c.rope_scaling == "yarn" and c.rope_theta_local:
        yield f"model.rope_theta_local={c.rope_theta_local:g}"
    if c.rope_scaling != "none" and name == "gemma2":
        yield f"model.rope_scaling={c.rope_scaling}"


def _write_settings(writer: Any, name: str, config: TransformerConfig) -> None:
    """Write the settings that llama.cpp reads from a model's configuration."""
    import gguf

    c = config
    writer.add_context_length(c.max_length)
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_heads)
    writer.add_vocab_size(c.vocab_size)
    if name == "gpt2":
        writer.add_layer_norm_eps(c.norm_eps)
        return
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    if c.n_experts:
        writer.add_expert_count(c.n_experts)
        writer.add_expert_used_count(c.experts_per_token)
    if c.rope_scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[c.rope_scaling.upper()])
        writer.add_rope_scaling_factor(c.rope_factor)
    if c.rope_scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(c.rope_original_length)
        writer.add_rope_scaling_yarn_beta_fast(c.rope_high_frequency)
        writer.add_rope_scaling_yarn_beta_slow(c.rope_low_frequency)
    if c.attention_softcap:
        writer.add_attn_logit_softcapping(c.attention_softcap)
    if c.logit_softcap:
        writer.add_final_logit_softcapping(c.logit_softcap)
    if c.window and name in _WITH_WINDOWS:
        is_global_N = np.asarray(c.is_global(c.n_layers))
        writer.add_sliding_window(c.window)
        writer.add_sliding_window_pattern([not is_global for is_global in is_global_N.tolist()])
        writer.add_rope_freq_base_swa(c.rope_theta_local or c.rope_theta)


def gguf_tensors(name: str, model: HuggingFaceModel) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a GGUF file, float32, with dimensions in numpy's order.

    Args:
        name: architecture of llama.cpp.
        model: the converted model for `transformers`.
    """
    import gguf

    config = model.config
    kinds = {of: kind for kind, of in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[name], config.n_layers)
    experts: dict[str, list[np.ndarray]] = {}
    for tensor in model.tensors:
        values = np.asarray(_converted(name, tensor.name, tensor.values(), config), np.float32)
        of_expert = re.sub(r"block_sparse_moe\.experts\.\d+", "feed_forward.experts", tensor.name)
        if of_expert != tensor.name:
            stacked = experts.setdefault(of_expert.removeprefix("model."), [])
            stacked.append(values)
            if len(stacked) < config.n_experts:
                continue
            values, of_expert = np.stack(stacked), of_expert.removeprefix("model.")
        found = names.get_name(of_expert, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"llama.cpp's {name} has no tensor for {tensor.name}")
        yield found, np.ascontiguousarray(values)
    if config.rope_scaling == "llama3":
        frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        scale = rope_scaling(config, jnp.zeros((1, 1), jnp.int32), None)
        assert scale is not None
        yield (
            "rope_freqs.weight",
            np.asarray(frequencies / scale(jnp.asarray(frequencies)), np.float32),
        )


def _converted(
    architecture: str, name: str, values: np.ndarray, config: TransformerConfig
) -> np.ndarray:
    """Return a tensor of `transformers` in llama.cpp's layout."""
    if architecture == "gpt2" and re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name):
        return values.T
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    heads: Mapping[str, int] = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}
    layer = name.split(".")[-2]
    if architecture == "llama" and layer in heads:
        halves = values.reshape(heads[layer], 2, -1, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)
    return values
