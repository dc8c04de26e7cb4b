"""Models by family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from lm.models.classic.lstm import RecurrentConfig
from lm.models.classic.nplm import Nplm, NplmConfig
from lm.models.classic.recurrent import Lstm
from lm.models.classic.recurrent_seq2seq import LstmEncoderDecoder
from lm.models.classic.word2vec import SkipGram, SkipGramConfig
from lm.models.decoder import Decoder
from lm.models.encoder import Encoder
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.transformer_config import TransformerConfig

FAMILIES: dict[str, tuple[Callable[..., nn.Module], type]] = {
    "decoder": (Decoder, TransformerConfig),
    "encoder": (Encoder, TransformerConfig),
    "encoder_decoder": (EncoderDecoder, TransformerConfig),
    "lstm": (Lstm, RecurrentConfig),
    "lstm_encoder_decoder": (LstmEncoderDecoder, RecurrentConfig),
    "nplm": (Nplm, NplmConfig),
    "skip_gram": (SkipGram, SkipGramConfig),
}


def make_model(config: ConfigDict, attention: str, context_attention: str) -> nn.Module:
    """The model that a resolved configuration describes, with the chosen attention."""
    model, kind = FAMILIES[config.model.family]
    chosen = {"attention": attention, "context_attention": context_attention}
    return model(model_config(config, kind, chosen))


def model_config(config: ConfigDict, kind: type, chosen: Mapping[str, Any]) -> Any:
    """The fields of `kind`, by their names, from a resolved configuration and what was chosen."""
    values = dict(config.model) | {
        "dtype": jnp.dtype(config.model.dtype),
        "remat": config.train.remat,
        "scan_unroll": config.train.scan_unroll,
        "loss_chunk": config.train.loss_chunk,
        **chosen,
    }
    return kind(**{field.name: values[field.name] for field in fields(kind)})
