"""Building the model of a configuration, by its family."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from lm.config.registries import MIXERS, MODELS


def make_model(config: ConfigDict, attention: str, context_attention: str) -> nn.Module:
    """Return the model that a resolved configuration describes.

    Args:
        config: resolved configuration.
        attention: attention kernel.
        context_attention: "ring" or "gather" where sequences are in parts, else "".
    """
    family = MODELS[config.model.family]
    chosen = {"attention": attention, "context_attention": context_attention}
    return family(model_config(config, config_class(family), chosen))


def config_class(family: type) -> type:
    """Return the dataclass that a model family is configured by: the type of its field `config`."""
    owner = next(c for c in family.__mro__ if "config" in vars(c).get("__annotations__", {}))
    return inspect.get_annotations(owner, eval_str=True)["config"]


def model_config(config: ConfigDict, kind: type, chosen: Mapping[str, Any]) -> Any:
    """Return the configuration of a model family.

    Args:
        config: resolved configuration.
        kind: dataclass whose fields are filled by their names.
        chosen: values that are not keys of the configuration.
    """
    values = dict(config.model) | {
        "dtype": jnp.dtype(config.model.dtype),
        "remat": config.train.remat,
        "scan_unroll": config.train.scan_unroll,
        "loss_chunk": config.train.loss_chunk,
        "mixer_options": mixer_options(config),
        "stream": "target",
        **chosen,
    }
    return kind(**{field.name: values[field.name] for field in fields(kind)})


def mixer_options(config: ConfigDict) -> Any:
    """Return the options that the token mixer was registered with, filled in, or None."""
    options = MIXERS.entries[config.model.mixer].options
    if options is None:
        return None
    return options(**{field.name: config.model[field.name] for field in fields(options)})
