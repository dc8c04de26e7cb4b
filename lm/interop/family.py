"""What a family of Hugging Face models is: its configuration and its tensors in terms of ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from lm.errors import UserError
from lm.interop.tensor_mapping import TensorMapping
from lm.models.init_config import InitConfig
from lm.models.transformer_config import TransformerConfig

Values = dict[str, Any]

# Fields of TransformerConfig that are no part of what a trained model computes.
EXECUTION = ("attention", "context_attention", "remat", "scan_unroll", "loss_chunk")
TRAINING = (
    "dropout",
    "final_dropout",
    "attention_dropout",
    "activation_dropout",
    *(f.name for f in fields(InitConfig)),
    "scale_residual_init",
    "expert_capacity",
    "balance_loss",
    "router_z_loss",
    "router_jitter",
)


class UnsupportedConfig(UserError):
    """What one side has and the other cannot say."""


@dataclass(frozen=True)
class Head:
    """What a class of theirs has on top of the stack: rows that are all there or all absent.

    `modules` are those of ours that it consists of.
    """

    modules: tuple[str, ...]
    rows: tuple[TensorMapping, ...]


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    classes: their class by the heads that a model has. prefix: what their bare model has not
    before its names. base, heads: the table of tensors. keys: their configuration's names of our
    values. fixed: our values that are always so. read, write: what of the configuration is more
    than a name, from theirs to ours and back. output: the tensor of the output projection, which
    a file may hold though it repeats `table`. copies: others that repeat one. ignored: patterns of
    tensors that are no weights. renamed: patterns of old names. in_file: values that the tensors
    of a file say, not the configuration.
    """

    model_type: str
    model: str
    classes: Mapping[frozenset[str], str]
    prefix: str
    base: Callable[[TransformerConfig], Sequence[TensorMapping]]
    keys: Mapping[str, str]
    fixed: Mapping[str, Any]
    read: Callable[[Values], Values]
    write: Callable[[TransformerConfig], Values]
    output: str
    table: str
    heads: Mapping[str, Head] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    in_file: Sequence[str] = ()

    def config(self, theirs: Values) -> TransformerConfig:
        """Our configuration of theirs; UserError for what it cannot say."""
        found = {ours: require(theirs, name) for name, ours in self.keys.items()}
        found = dict(self.fixed) | found | self.read(theirs)
        heads, width = found["n_heads"], found["d_model"]
        found.setdefault("n_kv_heads", heads)
        if not found.get("head_dim"):
            if width % heads:
                raise UserError(f"{width} numbers of a token are not divisible by {heads} heads")
            found["head_dim"] = width // heads
        return TransformerConfig(**found)

    def differences(self, config: TransformerConfig) -> list[str]:
        """What of a configuration does not come back from theirs, as "key=value"."""
        try:
            back = self.config(self.theirs(config))
        except UnsupportedConfig as error:
            return [str(error)]
        ours, again = comparable_config(config, self.model), comparable_config(back, self.model)
        return [
            f"model.{name}={getattr(config, name, value)}"
            for name, value in ours.items()
            if name not in self.in_file and again.get(name) != value
        ]

    def rows(self, config: TransformerConfig, paths: Collection[str]) -> list[TensorMapping]:
        """The lines of the table that a model with these parameters has: all of them are there."""
        of_heads = (row for head in self.heads.values() for row in head.rows)
        rows = [row for row in [*self.base(config), *of_heads] if row.paths[0] in paths]
        left = sorted({*paths} - {path for row in rows for path in row.paths})
        if left:
            raise UnsupportedConfig(f"{self.model_type} has no tensor for the parameter {left[0]}")
        return rows

    def theirs(self, config: TransformerConfig) -> Values:
        """Their configuration of ours, without the class."""
        values = {name: getattr(config, ours) for name, ours in self.keys.items()}
        return {"model_type": self.model_type} | values | self.write(config)


def comparable_config(config: TransformerConfig, model: str) -> Values:
    """The values that determine what a model computes, and nothing that has no effect."""
    c = config
    values = asdict(c) | {"bias": c.bias, "query_bias": c.query_bias}
    values |= {"attention_output_bias": c.attention_output_bias, "attention_scale": c.score_scale}
    unused = {*EXECUTION, *TRAINING, "attention_bias", "n_classes"}
    if c.norm == "rmsnorm":
        unused.add("norm_bias")
    if c.positions != "learned":
        unused |= {"position_offset", "max_length"}
    is_global_N = c.is_global(c.n_layers)
    values["global_every"] = [] if is_global_N is None else np.flatnonzero(is_global_N).tolist()
    if c.rope_theta_local == c.rope_theta and c.rope_scaling == "none":
        values["rope_theta_local"] = 0.0
    if not c.window:
        unused |= {"global_every", "rope_theta_local"}
    if not c.n_experts:
        unused |= {"experts_per_token", "experts_every"}
    of_rope = {f.name for f in fields(c) if f.name.startswith("rope_")}
    scaling = of_rope - {"rope_theta", "rope_theta_local", "rope_scaling"}
    if c.positions != "rotary":
        unused |= of_rope
    elif c.rope_scaling == "none":
        unused |= scaling
    elif c.rope_scaling == "linear":
        unused |= scaling - {"rope_factor"}
    if c.positions != "relative":
        unused |= {"relative_buckets", "relative_max_distance"}
    if not c.tie_embeddings:
        unused.add("scale_logits")
    if model != "encoder_decoder":
        unused.add("n_decoder_layers")
    return {name: value for name, value in values.items() if name not in unused}


# --- reading their configuration


def require(theirs: Values, name: str) -> Any:
    """A value that config.json must have."""
    if theirs.get(name) is None:
        raise UserError(f"config.json has no {name}")
    return theirs[name]


def require_equal(theirs: Values, **expected: Any) -> None:
    """Refuse settings that our models don't have; absent ones and null are their defaults."""
    for name, value in expected.items():
        found = theirs.get(name)
        if found is not None and found != value:
            raise UnsupportedConfig(f"config.json: {name}={found} is not supported, only {value}")


def choose(theirs: Values, name: str, table: Mapping[str, str], default: str) -> str:
    """Our word for their value of a key."""
    found = theirs.get(name) or default
    if found not in table:
        raise UnsupportedConfig(
            f"config.json: {name}={found} is not supported, only {', '.join(table)}"
        )
    return table[found]


def word_for(value: str, table: Mapping[str, str], key: str) -> str:
    """Their first word for our value of model.`key`."""
    for theirs, ours in table.items():
        if ours == value:
            return theirs
    raise UnsupportedConfig(f"model.{key}={value}")
