"""Whisper (Radford et al. 2022): `WhisperForConditionalGeneration`.

The encoder's positions are a tensor of the file, always the same sinusoids. Values without effect
on a trained model are ignored: scale_embedding, layer drop, SpecAugment and the classifier's. A
feature extractor in the folder must have the settings of the paper: 16 kHz, windows of 400 samples
every 160, and the number of frames that the encoder reads.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from lm.interop.bart import STACK_KEYS, layer_mappings, read_stacks, write_stacks
from lm.interop.family import Family, UnsupportedConfig, Values
from lm.interop.tensor_mapping import (
    TensorMapping,
    norm_mappings,
    output_mapping,
    same_layout,
)
from lm.models.audio_front_end import STRIDE, split_sinusoidal
from lm.models.transformer_config import TransformerConfig

SAMPLE_RATE, HOP, WINDOW = 16_000, 160, 400  # Hz, and samples


def _convolution(name: str) -> list[TensorMapping]:
    weight, path = f"model.encoder.{name}.weight", f"front_end/{name}"
    return [
        TensorMapping(weight, (f"{path}/kernel",), "D C T", "T C D"),
        same_layout(f"model.encoder.{name}.bias", f"{path}/bias"),
    ]


def _base(config: TransformerConfig) -> list[TensorMapping]:
    return [
        *_convolution("conv1"),
        *_convolution("conv2"),
        same_layout("model.decoder.embed_tokens.weight", "tokens/embedding"),
        same_layout("model.decoder.embed_positions.weight", "positions/embedding"),
        *layer_mappings("encoder"),
        *layer_mappings("decoder"),
        *norm_mappings("model.encoder.layer_norm", "encoder/final_norm"),
        *norm_mappings("model.decoder.layer_norm", "decoder/final_norm"),
        output_mapping("proj_out.weight"),
    ]


def _read(hf: Values) -> Values:
    for name in ("num_mel_bins", "max_source_positions"):
        if not hf[name]:
            raise UnsupportedConfig(f"config.json: {name} is less than 1")
    if hf["d_model"] % 2 or hf["d_model"] < 4:
        raise UnsupportedConfig(f"config.json: d_model={hf['d_model']} is odd or below 4")
    return read_stacks(hf) | {"tie_embeddings": hf.get("tie_word_embeddings", True)}


def _write(config: TransformerConfig) -> Values:
    # The default padding id exceeds a small vocabulary.
    return write_stacks(config) | {
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": None,
    }


def _positions(config: TransformerConfig) -> np.ndarray:
    positions_1S = jnp.arange(config.max_source_length)[None]
    return np.asarray(split_sinusoidal(positions_1S, config.d_model)[0])


def _preprocessor(config: TransformerConfig) -> Values:
    """Return the feature extractor's settings, for audio that fills the encoder's positions."""
    n_frames = STRIDE * config.max_source_length
    seconds, rest = divmod(n_frames * HOP, SAMPLE_RATE)
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": config.n_mels,
        "sampling_rate": SAMPLE_RATE,
        "hop_length": HOP,
        "n_fft": WINDOW,
        "chunk_length": seconds + rest / SAMPLE_RATE if rest else seconds,
        "padding_value": 0.0,
        "dither": 0.0,
    }


def _processor(config: TransformerConfig) -> Values:
    return {
        "processor_class": "WhisperProcessor",
        "feature_extractor": _preprocessor(config),
    }


WHISPER = Family(
    model_type="whisper",
    model="encoder_decoder",
    classes={frozenset(): "WhisperForConditionalGeneration"},
    prefix="model.",
    base=_base,
    keys=STACK_KEYS
    | {
        "num_mel_bins": "n_mels",
        "max_source_positions": "max_source_length",
        "max_target_positions": "max_length",
    },
    fixed={
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "positions": "learned",
        "attention_bias": "no_key",
    },
    read=_read,
    write=_write,
    output="proj_out.weight",
    table="model.decoder.embed_tokens.weight",
    constants={"model.encoder.embed_positions.weight": _positions},
    further_files={  # as transformers 4 and 5 write them
        "preprocessor_config.json": _preprocessor,
        "processor_config.json": _processor,
    },
    objective="transcription",
)
