"""Model configurations: initialization, Transformer stack, and layer types.

A Transformer is configured by values, not classes: GPT-2, Llama, BERT and T5 are instances of
`TransformerConfig`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lm.config.registries import MIXERS, MODELS
from lm.models.attention_config import ATTENTION_BIASES, AttentionConfig
from lm.models.embedding_config import EmbeddingConfig
from lm.models.experts_config import ExpertsConfig
from lm.models.layer_patterns import expert_layers, global_layers, nope_layers
from lm.models.residual_config import SUBLAYERS, ResidualConfig
from lm.models.variables import Initializer, Stream


@dataclass(frozen=True)
class LayerType:
    """Kind of one layer of a stack.

    Attributes:
        feed_forward: "dense", "experts" or "none".
        mixer: name of the token mixer (`lm/models/attention.py`).
        is_local: attends within the window. Layers that differ only in this share one scan, which
            receives it as an array.
        scannable: has the same parameter shapes as its neighbors; other layers are unrolled.
        group: layers of different groups never share a scan.
        raw_input: sublayers without an input norm.
    """

    feed_forward: str = "dense"
    mixer: str = "attention"
    is_local: bool = False
    scannable: bool = True
    group: int = 0
    raw_input: tuple[str, ...] = ()


@dataclass(frozen=True)
class Segment:
    """Consecutive layers of a stack that run as one scan over a repeating period, or unrolled.

    Attributes:
        name: module name, "layers" if the segment is the whole stack, else "layers_{first}".
        first: number of its first layer.
        period: types of the repeating layers; if unrolled, of all layers.
        n_repeats: how many times the period repeats.
    """

    name: str
    first: int
    period: tuple[LayerType, ...]
    n_repeats: int

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.period) * self.n_repeats

    @property
    def is_scanned(self) -> bool:
        """True if the layers run as a scan, False if they are unrolled."""
        return self.period[0].scannable


def segments(types: tuple[LayerType, ...]) -> tuple[Segment, ...]:
    """Group the layers of a stack into segments, each with the shortest period that repeats."""
    found: list[Segment] = []
    first = 0
    for (scannable, _), run in groupby(types, key=lambda t: (t.scannable, t.scannable and t.group)):
        run_types = tuple(replace(t, is_local=False) for t in run)
        n = len(run_types)
        sizes = (k for k in range(1, n + 1) if n % k == 0 and run_types == run_types[:k] * (n // k))
        size = next(sizes) if scannable else n
        name = "layers" if n == len(types) else f"layers_{first}"
        found.append(Segment(name, first, run_types[:size], n // size))
        first += n
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Initialization, dtype and token stream of a model; `lm/config/` describes the fields.

    `stream` is the parameters' token stream; "source" for the encoder of an encoder–decoder.
    """

    init: str = "normal"
    init_std: float = 0.02
    init_scale: float = 1.0
    init_truncated: bool = False
    dtype: jnp.dtype = jnp.float32
    stream: Stream = "target"

    def stddev(self, n_in: float, n_out: float) -> float:
        """Return the standard deviation of a new kernel, or its bound with init "uniform"."""
        by_kind = {
            "normal": self.init_std,
            "uniform": self.init_std,
            "fan_in": (self.init_scale / n_in) ** 0.5,
            "xavier": (2 / (n_in + n_out)) ** 0.5,
        }
        return by_kind[self.init]

    def kernel_init(self, stddev: float) -> Initializer:
        """Return the initializer of a kernel or table.

        Truncated normals are cut at two standard deviations, which leaves 0.88 of the deviation (as
        in the code of Devlin et al. 2018 and Fedus et al. 2021, §2.4).
        """
        if self.init == "uniform":
            return symmetric_uniform(stddev)
        draw = nn.initializers.truncated_normal if self.init_truncated else nn.initializers.normal
        return draw(stddev)

    @property
    def table_init(self) -> Initializer:
        """Initializer of an embedding."""
        return self.kernel_init(self.init_std)

    def bias_init(self, start: Initializer = nn.initializers.zeros) -> Initializer:
        """Return the initializer of a bias: `start`, unless init is "uniform"."""
        return symmetric_uniform(self.init_std) if self.init == "uniform" else start


def symmetric_uniform(bound: float) -> Initializer:
    """Return the initializer that draws uniformly from ± bound."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


@dataclass(frozen=True)
class TransformerConfig(
    InitConfig, AttentionConfig, EmbeddingConfig, ExpertsConfig, ResidualConfig
):
    """Transformer stack; fields are documented in `lm/config/keys.py`.

    `unrolled` (no layers are stacked) and `cache_dtype` are set by `lm/decoding/weights.py`.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    max_length: int
    n_decoder_layers: int = 0
    feed_forward: bool = True
    bias: bool = True
    activation: str = "gelu_tanh"
    mup_base_width: int = 0
    mup_base_head_dim: int = 0
    attention: str = "xla"
    context_attention: str = "ring"
    remat: str = "none"
    scan_unroll: int = 1
    loss_chunk: int = 0
    unrolled: bool = False
    cache_dtype: str = ""

    def layer_types(self, n_layers: int) -> tuple[LayerType, ...]:
        """Return the type of each layer of a stack of `n_layers`."""
        is_global_N, sparse_N, types = np.ones(n_layers, bool), np.zeros(n_layers, bool), []
        plain = "dense" if self.feed_forward else "none"
        if self.window or self.n_experts:
            is_global_N, sparse_N = global_layers(self, n_layers), expert_layers(self, n_layers)
        for i in range(n_layers):
            raw = ("attention",) if i == 0 and not self.first_norm else ()
            types.append(
                LayerType(
                    feed_forward="experts" if sparse_N[i] else plain,
                    mixer="attention" if i in self.attention_layers else self.mixer,
                    is_local=not is_global_N[i],
                    scannable=self.residual != "concat" and not self.unrolled,
                    group=int(i >= max(self.dense_layers, self.first_conv > 0)) + 2 * len(raw),
                    raw_input=SUBLAYERS if self.residual == "parallel" else raw,
                )
            )
        return tuple(types)

    @property
    def is_wide(self) -> bool:
        """True if blocks do not add each sublayer to one sum (`wide_streams.py`)."""
        return self.residual != "sum" or self.value_residual != "none"

    @property
    def score_scale(self) -> float:
        """Scale of the attention scores."""
        return self.attention_scale or self.head_dim**-0.5

    def is_nope(self, n_layers: int) -> np.ndarray | None:
        """Return the layers without positions, [N] bool; None if all layers are alike."""
        return nope_layers(self, n_layers) if self.nope_every or self.nope_layers else None

    def is_global(self, n_layers: int) -> np.ndarray | None:
        """Return `global_layers` of a stack of `n_layers`, or None if all layers are alike."""
        is_mixed = self.window and (self.global_every or self.global_layers)
        return global_layers(self, n_layers) if is_mixed else None

    @property
    def attention_biases(self) -> tuple[str, ...]:
        """Attention projections with biases, of "query", "key", "value" and "out"."""
        of_model = "all" if self.bias else "none"
        return ATTENTION_BIASES[of_model if self.attention_bias == "same" else self.attention_bias]

    @property
    def width_ratio(self) -> float:
        """d_model over that of the muP base model; 1 in the standard parametrization."""
        return self.d_model / (self.mup_base_width or self.d_model)

    @property
    def base_head_dim(self) -> int:
        """head_dim of the muP base model, or of this model without muP."""
        return self.mup_base_head_dim or self.head_dim

    @property
    def query_multiplier(self) -> float:
        """MuP multiplier of the query scale, so that scores scale as 1/head_dim."""
        ratio = self.base_head_dim / self.head_dim
        return ratio if self.attention_scale else ratio**0.5

    def std(self, n_in: int, n_out: int) -> float:
        """Return the initial standard deviation of a hidden kernel [n_in, n_out].

        In muP it falls as 1/sqrt(inputs) from that of the base model (Yang et al. 2022, Table 8).
        """
        m = self.width_ratio
        return self.stddev(n_in / m, n_out / m) / m**0.5

    def output_std(self, n_out: int, n_in: int = 0) -> float:
        """Return the initial standard deviation of an output kernel [n_in or d_model, n_out].

        In muP it is that of the base model, and the scores are divided by `width_ratio` (Table 8).
        """
        return self.stddev((n_in or self.d_model) / self.width_ratio, n_out)

    def residual_std(self, n_in: int, n_out: int) -> float:
        """Return `std`, scaled for kernels that write to a residual stream.

        Divided by sqrt of the residual layers (GPT-2 §2.3), multiplied for the streams of
        hyper-connections (Zhu et al. 2024, §4).
        """
        is_scaled = self.scale_residual_init and self.residual != "concat"
        shrink = (2 * self.n_layers) ** 0.5 if is_scaled else 1.0
        streams = self.hyper_streams if self.residual == "hyper" else 1
        return self.std(n_in, n_out) / shrink * streams**0.5


# --- from the configuration file


def make_model(config: ConfigDict, attention: str, context_attention: str) -> nn.Module:
    """Return the model that a resolved configuration describes.

    Args:
        config: resolved configuration.
        attention: attention kernel.
        context_attention: "ring" or "gather" under context parallelism, else "".
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
        **chosen,
    }
    return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})


def mixer_options(config: ConfigDict) -> Any:
    """Return the options that the token mixer was registered with, filled in, or None."""
    options = MIXERS.entries[config.model.mixer].options
    if options is None:
        return None
    return options(**{field.name: config.model[field.name] for field in fields(options)})
