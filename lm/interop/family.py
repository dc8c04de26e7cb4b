"""Hugging Face model family: mapping of configuration and tensors to this library's."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from lm.config.model_rules import least_distance, rotary_problems, rotary_width
from lm.config.registries import STATE_SPACES
from lm.config.registry import option_keys
from lm.errors import UserError
from lm.interop.class_defaults import ALIASES, CLASS_DEFAULTS
from lm.interop.fused_tensors import Fused
from lm.interop.tensor_files import StoredTensor
from lm.interop.tensor_mapping import TensorMapping, linear_mappings, of_segments
from lm.kernels.elementwise import output_activation
from lm.models.expert_choice import has_groups, has_normalized_weights
from lm.models.experts_config import ExpertsConfig
from lm.models.moe import expert_width
from lm.models.positions import has_position_table
from lm.models.rotary import SCALING_FIELDS, attention_factor
from lm.models.transformer_config import InitConfig, TransformerConfig, segments
from lm.models.variables import MODEL_STATE

Values = dict[str, Any]

# Fields of TransformerConfig that do not change what a trained model computes.
EXECUTION = ("attention", "context_attention", "remat", "scan_unroll", "loss_chunk")
TRAINING = (
    "dropout",
    "final_dropout",
    "attention_dropout",
    "activation_dropout",
    *(f.name for f in fields(InitConfig)),
    "scale_residual_init",
    "generator_width",
    "generator_layers",
    "expert_capacity",
    "balance_loss",
    "router_z_loss",
    "router_jitter",
)


class UnsupportedConfig(UserError):
    """Setting that the other library's configuration cannot express."""


OUTPUT = "head"  # module of the output projection when embeddings are untied


@dataclass(frozen=True)
class Head:
    """Head of a Hugging Face class: its tensors are all present or all absent.

    Attributes:
        modules: modules of the model in `lm.models` that the head consists of.
        mappings: rows of the tensor table; a parameter in no row is zero.
        replaces_output: models with this head have no output projection.
        of_tokens: whether it classifies every token, or whole texts; None: as the class has it.
        prefix: prefix of the stack's tensors in classes with this head; "": the family's.
    """

    modules: tuple[str, ...]
    mappings: tuple[TensorMapping, ...]
    replaces_output: bool = False
    of_tokens: bool | None = None
    prefix: str = ""


def _unchanged(hf: Values, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    return stored


@dataclass(frozen=True)
class Family:
    """Mapping of one `model_type`.

    Attributes:
        model_type: value of that key in config.json.
        model: `--config.model.family` of the models.
        classes: Hugging Face class by the model's heads; those with the same modules differ in
            what they classify.
        prefix: prefix of tensor names, absent in the bare model (`…Model`).
        base: returns the tensor table of the stack.
        keys: keys of config.json that correspond to a field of TransformerConfig.
        fixed: fields of TransformerConfig with a fixed value in this family.
        read: returns the fields that need more than a renaming, from config.json.
        write: returns the keys that need more than a renaming, from a TransformerConfig.
        output: tensor of the output projection; a file may store it even if it equals `table`.
        table: tensor of the token embeddings.
        heads: heads by name.
        copies: additional tensors that repeat another one.
        ignored: patterns of tensors that are not weights.
        renamed: patterns of old tensor names, and their replacements.
        in_file: fields determined by the tensors of a file, not by config.json.
        fused: file tensors that contain several of the table (`fused_tensors.py`).
        alternating: number of times that the parts of a fused tensor alternate in it; else once.
        constants: tensors with the same values in all models of a configuration.
        adapted: returns the tensors of a file as a model of this configuration has them.
        further_files: required contents of other JSON files of a folder, by name, if they exist.
        left_out: modules that a class lacks, and that are left out.
        zeros: patterns of parameters that a class lacks, and that are zero.
        objective: pretraining objective, "" for the usual one of `model`.
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
    fused: Fused = field(default_factory=dict)
    alternating: Mapping[str, Callable[[TransformerConfig], int]] = field(default_factory=dict)
    constants: Mapping[str, Callable[[TransformerConfig], np.ndarray]] = field(default_factory=dict)
    adapted: Callable[[Values, dict[str, StoredTensor]], dict[str, StoredTensor]] = _unchanged
    further_files: Mapping[str, Callable[[TransformerConfig], Values]] = field(default_factory=dict)
    left_out: Sequence[str] = ()
    zeros: Sequence[str] = ()
    objective: str = ""

    def read_config(self, hf: Values) -> TransformerConfig:
        """Convert config.json to a TransformerConfig.

        Raises:
            UserError: a key is missing, or its value is not supported.
        """
        aliases = ALIASES.get(self.model_type, {})
        other = {key: hf[name] for name, key in aliases.items() if hf.get(name) is not None}
        hf = {**CLASS_DEFAULTS.get(self.model_type, {}), **other, **hf}
        _check_flags(hf)
        found: Values = {field: read_size(hf, name) for name, field in self.keys.items()}
        _check_layers(found["n_layers"])
        found = dict(self.fixed) | found | self.read(hf)
        found |= {n: 0.0 for n, x in found.items() if x is None and n.endswith("dropout")}
        heads, width = found["n_heads"], found["d_model"]
        found.setdefault("n_kv_heads", heads)
        names = {field: name for name, field in self.keys.items()}
        _check_types(found, names)
        of_heads = f"config.json: {names.get('n_heads')}={heads}"
        if heads % found["n_kv_heads"]:
            raise UserError(f"{of_heads} is not divisible by {found['n_kv_heads']} heads of keys")
        if not found.get("head_dim"):
            if width % heads:
                raise UserError(f"{of_heads} does not divide {names['d_model']}={width}")
            found["head_dim"] = width // heads
        config = TransformerConfig(**found)
        if config.relative_buckets < 4 or config.relative_max_distance <= least_distance(config):
            raise UserError("config.json: the relative positions have too few buckets or distances")
        if config.mixer_options is not None:
            for path, key in option_keys(type(config.mixer_options), "mixer").items():
                name = path.removeprefix("mixer.")
                if problem := key.problem(getattr(config.mixer_options, name)):
                    raise UserError(f"config.json: {name}{problem}")
        if config.positions == "rotary" and config.head_dim % 2:
            raise UnsupportedConfig(f"config.json: RoPE has no head_dim={config.head_dim}: odd")
        for problem in rotary_problems(config):
            raise UnsupportedConfig(f"config.json: {problem.replace('--config.model.', '')}")
        return config

    def lost_fields(self, config: TransformerConfig, has_task: bool) -> list[str]:
        """Return the fields lost in a Hugging Face round trip, as "model.key=value".

        Args:
            config: configuration of the model.
            has_task: whether the model has a pooler, or a head on its hidden states.

        Raises:
            UnsupportedConfig: config.json cannot express a field at all.
        """
        round_trip = self.read_config(self.write_config(config))
        before = comparable_config(config, self.model, has_task)
        after = comparable_config(round_trip, self.model, has_task)
        lost = [
            name
            for name, value in before.items()
            if name not in self.in_file and after.get(name) != value
        ]
        # Some values follow from others, such as the scale of scores from the size of a head.
        own = [n for n in lost if getattr(config, n, 0) != getattr(round_trip, n, 1)] or lost
        values = {name: getattr(config, name, before[name]) for name in own}
        return [f"model.{name}={_as_written(value)}" for name, value in values.items()]

    def mappings(
        self, config: TransformerConfig, paths: Collection[str], heads: Collection[str]
    ) -> list[TensorMapping]:
        """Return the tensor table for a model with these parameters and heads.

        Raises:
            UnsupportedConfig: a parameter is in no row, is not a head's bias and not always zero.
        """
        of_heads = (mapping for name in heads for mapping in self.heads[name].mappings)
        parts = segments(config.layer_types(config.n_layers))
        rows = [*self.base(config), *of_heads]
        for stack in ("stack", f"{MODEL_STATE}/stack"):
            rows = of_segments(rows, parts, stack)
        found = [m for m in rows if m.paths[0] in paths]
        modules = {module for name in heads for module in self.heads[name].modules}
        left = sorted({*paths} - {path for mapping in found for path in mapping.paths})
        for path in left:
            is_of_head = path.partition("/")[0] in modules and path.endswith("/bias")
            if not is_of_head and not any(re.search(pattern, path) for pattern in self.zeros):
                raise UnsupportedConfig(f"{self.model_type} has no tensor for the parameter {path}")
        return found

    def heads_of(self, modules: Collection[str], of_tokens: bool) -> frozenset[str] | None:
        """Return the heads of the class that has these modules; None if there is none.

        BERT's pretraining class may lack the next-sentence head: it is written as zeros.

        Args:
            modules: modules of the model.
            of_tokens: whether the classifier is one of every token.
        """
        own = {name: set(head.modules) for name, head in self.heads.items()}
        wrong = {name for name, head in self.heads.items() if head.of_tokens is (not of_tokens)}
        present = set().union(*own.values()) & set(modules)
        fitting = [
            heads
            for heads in self.classes
            if present <= set().union(*(own[name] for name in heads - wrong))
            and {name for name in heads if not own[name] & present} <= {"next_sentence"}
        ]
        return min(fitting, key=len, default=None)

    def renamed_to(self, class_name: str, name: str) -> str:
        """Return the name that a tensor of the table has in files of a class."""
        heads = next(heads for heads, its in self.classes.items() if its == class_name)
        is_bare = class_name.lower() == f"{self.model_type.replace('-', '')}model"
        own = next((self.heads[n].prefix for n in heads if self.heads[n].prefix), self.prefix)
        of_heads = {m.name for n in heads for m in self.heads[n].mappings}
        if not name.startswith(self.prefix) or (name in of_heads and not self.prefix):
            return name
        return ("" if is_bare else own) + name.removeprefix(self.prefix)

    def write_config(self, config: TransformerConfig) -> Values:
        """Convert a TransformerConfig to config.json values, except `architectures`."""
        values = {name: getattr(config, field) for name, field in self.keys.items()}
        return {"model_type": self.model_type} | values | self.write(config)


def _as_written(value: Any) -> str:
    """Return a value of the configuration as it is written in a command."""
    if not isinstance(value, tuple):
        return str(value)
    return ",".join(f"{x:g}" if isinstance(x, float) else str(x) for x in value)


# A decoder's heads, and the ends of their classes' names. Only the last token has no bias.
_SCORE = TensorMapping("score.weight", ("classifier/kernel",), "C D", "D C")
_HEADS = {
    "classes": Head(("classifier",), (_SCORE,), replaces_output=True, of_tokens=False),
    "tags": Head(
        ("classifier",),
        (_SCORE, TensorMapping("score.bias", ("classifier/bias",))),
        replaces_output=True,
        of_tokens=True,
    ),
    "spans": Head(
        ("span_head",), tuple(linear_mappings("qa_outputs", "span_head")), replaces_output=True
    ),
}
_TASKS = {
    "classes": "ForSequenceClassification",
    "tags": "ForTokenClassification",
    "spans": "ForQuestionAnswering",
}


def decoder_heads(
    name: str, heads: Collection[str], spans_prefix: str = ""
) -> tuple[dict[str, Head], dict[frozenset[str], str]]:
    """Return a decoder's heads, and its classes by heads.

    Args:
        name: class of the language model, such as GPT2LMHeadModel.
        heads: those of "classes", "tags" and "spans" that have a class.
        spans_prefix: prefix of the stack's tensors in the class of "spans", if it has its own.
    """
    prefix = name.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    prefix += "Text" if prefix == "Gemma3" else ""  # the plain class also reads images
    found = {head: _HEADS[head] for head in heads}
    if "spans" in found:
        found["spans"] = replace(found["spans"], prefix=spans_prefix)
    return found, {frozenset(): name} | {frozenset({h}): f"{prefix}{_TASKS[h]}" for h in heads}


_FLAGS = frozenset(
    {
        *("attention_bias", "mlp_bias", "qkv_bias", "tie_word_embeddings", "use_sliding_window"),
        *("norm_topk_prob", "rope_interleave", "scale_attn_weights", "scale_decoder_outputs"),
        *("use_qk_norm", "attn_temperature_tuning", "use_qkv_bias"),
        *("scale_attn_by_inverse_layer_idx", "use_bidirectional_attention", "is_decoder"),
        *("classifier_bias", "decoder_bias", "norm_bias", "use_bias", "mamba_proj_bias"),
        *("use_conv_bias", "mamba_conv_bias", "use_parallel_residual", "qk_layernorm"),
        *("relative_attention", "share_att_key", "position_biased_input", "legacy"),
        "scale_embedding",
    }
)


# Lists in config.json, and the type of their items; null is the default.
_LISTS = {
    **dict.fromkeys(("layer_types", "mlp_layer_types"), str),
    **dict.fromkeys(("attn_layer_indices", "mlp_only_layers"), int),
    **dict.fromkeys(("moe_layers", "no_rope_layers"), int),
}


def _check_flags(hf: Values) -> None:
    """Raise UserError for a flag or list in config.json of another type, null aside."""
    for name in sorted(_FLAGS & hf.keys()):
        if not isinstance(hf[name], bool | None):
            raise UserError(f"config.json: {name}={hf[name]!r:.40} is neither true nor false")
    for name, kind in _LISTS.items():
        items = hf.get(name)
        if items is not None and not (
            isinstance(items, list | tuple) and all(isinstance(item, kind) for item in items)
        ):
            raise UserError(
                f"config.json: {name}={items!r:.40} is not a list of "
                + ("words" if kind is str else "numbers")
            )


_LARGEST = 2**31 - 1
_MOST_LAYERS = 100_000  # for more, finding out that their tensors are missing would take long


def _check_layers(n_layers: int) -> None:
    if n_layers > _MOST_LAYERS:
        raise UserError(f"config.json: {n_layers} layers are more than {_MOST_LAYERS:,}")


def read_size(hf: Values, name: str) -> int:
    """Return an integer from config.json; UserError if it is not one, negative or too large."""
    value = require(hf, name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
        raise UserError(f"config.json: {name} is not a number from 0 to {_LARGEST}")
    return value


def _check_types(found: Values, names: Mapping[str, str]) -> None:
    """Raise UserError for a value that its field cannot have; `names` are keys of config.json."""
    kinds: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}
    for of in fields(TransformerConfig):
        value: Any = found.get(of.name)
        kind = kinds.get(str(of.type))
        if of.name not in found or kind is None:
            continue
        is_number = of.type in ("int", "float")
        if not isinstance(value, kind) or (is_number and isinstance(value, bool)):
            raise UserError(f"config.json: {names.get(of.name, of.name)} is not of type {of.type}")
        if is_number and not -_LARGEST <= value <= _LARGEST:
            raise UserError(f"config.json: {names.get(of.name, of.name)} is out of range")
    sizes = (
        *("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "vocab_size", "max_length"),
        "experts_per_token",
    )
    if found.get("norm_eps", 1.0) < 0:
        raise UserError("config.json: norm_eps is less than 0")
    if (found.get("head_dim") or 1) < 1:
        raise UserError("config.json: head_dim is less than 1")
    for name in sizes:
        if found.get(name) is not None and found[name] < 1:
            raise UserError(f"config.json: {names.get(name, name)} is less than 1")


def comparable_config(config: TransformerConfig, model: str, has_task: bool) -> Values:
    """Return the values that affect what a model computes.

    Args:
        config: configuration of the model.
        model: `--config.model.family`.
        has_task: whether the model has a pooler, or a head on its hidden states.
    """
    c = config
    values = asdict(c) | {"attention_biases": c.attention_biases, "attention_scale": c.score_scale}
    unused = {*EXECUTION, *TRAINING, "attention_bias", "n_classes", "concat_width"}
    values["transform_activation"] = output_activation(c.transform_activation, c.activation)
    if c.norm == "rmsnorm":
        unused.add("norm_bias")
    if not has_position_table(c):
        unused |= {"position_offset", "max_length"}
    is_global_N = c.is_global(c.n_layers)
    unused |= {"global_first", "global_layers", "nope_layers", "expert_layers"}
    values["global_every"] = [] if is_global_N is None else np.flatnonzero(is_global_N).tolist()
    if c.rope_theta_local == c.rope_theta and c.rope_scaling == "none":
        values["rope_theta_local"] = 0.0
    if not c.window:
        unused |= {"global_every", "rope_theta_local", "window_chunks"}
    is_nope_N = c.is_nope(c.n_layers) if c.positions == "rotary" else None
    values["nope_every"] = [] if is_nope_N is None else np.flatnonzero(is_nope_N).tolist()
    if not values["nope_every"]:
        unused |= {"nope_temperature", "nope_temperature_length"}
    if not c.nope_temperature:
        unused.add("nope_temperature_length")
    if not c.qk_norm:
        unused.add("qk_norm_over")
    if c.n_experts:
        types = [kind.feed_forward for kind in c.layer_types(c.n_layers)]
        values |= {"experts_every": types, "dense_layers": 0, "expert_d_ff": expert_width(c)}
        values["expert_weights"] = has_normalized_weights(c)
        unused |= set() if "dense" in types else {"d_ff"}
        values["router_bias_rate"] = c.router_bias_rate > 0
        if not has_groups(c):
            values["expert_groups"] = 0
            unused |= {"expert_groups_per_token", "expert_group_best"}
    else:
        unused |= {f.name for f in fields(ExpertsConfig)} - {"n_experts"}
    if model != "encoder":
        unused |= {"transform_bias", "transform_activation", "task_transform", "pooler_activation"}
    if c.task_transform:
        unused.add("pooler_activation")
    if not has_task:
        unused |= {"pooler_activation", "task_transform"}
        values["pooling"] = "mean" if c.pooling == "mean" else "family"
        unused.add("start_id")
    if not c.shared_expert_d_ff:
        unused.add("shared_expert_gate")
    of_rope = {f.name for f in fields(c) if f.name.startswith("rope_")}
    if c.positions == "rotary":
        of_rope -= {"rope_theta", "rope_theta_local", "rope_scaling", "rope_fraction", "rope_norm"}
        of_rope -= set(SCALING_FIELDS[c.rope_scaling])
    unused |= of_rope
    values |= {"rope_attention_factor": attention_factor(c), "rope_fraction": rotary_width(c)}
    if c.positions not in ("relative", "disentangled"):
        unused |= {"relative_buckets", "relative_max_distance", "relative_per_layer"}
    if not c.embedding_size:
        unused.add("projection_first")
    if not c.tie_embeddings:
        unused.add("scale_logits")
    if not c.first_conv:
        unused.add("conv_activation")
    kinds = c.layer_types(c.n_layers)
    if all(kind.feed_forward == "none" for kind in kinds):
        unused |= {"d_ff", "activation", "bias"}
    if c.mixer in STATE_SPACES:
        del values["mixer_options"]["ssm_chunk"]
    if all(kind.mixer in STATE_SPACES for kind in kinds):
        unused |= {"n_heads", "n_kv_heads", "head_dim", "attention_biases"}
        unused |= {"attention_scale", "qk_norm", "rope_fraction"}
    if model != "encoder_decoder":
        unused |= {"n_decoder_layers", "separate_embeddings", "n_encoder_heads", "encoder_d_ff"}
        unused.add("separate_tokens")
    else:
        values["n_decoder_layers"] = c.n_decoder_layers or c.n_layers
        values["n_encoder_heads"] = c.n_encoder_heads or c.n_heads
        values["encoder_d_ff"] = c.encoder_d_ff or c.d_ff
        values["separate_embeddings"] &= c.positions == "learned" or c.embedding_norm
    return {name: value for name, value in values.items() if name not in unused}


# --- values of config.json


def require(hf: Values, name: str) -> Any:
    """Return a required value of config.json; UserError if it is missing or null."""
    if hf.get(name) is None:
        raise UserError(f"config.json has no {name}")
    return hf[name]


def positive_number(name: str, value: Any) -> float:
    """Return a positive number from config.json; UserError for any other value."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < 2.0**63:
        raise UserError(f"config.json: {name}={value!r:.40} is not a positive number")
    return float(value)


def states_class(hf: Values, names: Collection[str]) -> bool:
    """Return whether `architectures` of config.json has one of these classes."""
    stated = hf.get("architectures")
    return isinstance(stated, list) and any(name in stated for name in names)


def require_equal(hf: Values, **expected: Any) -> None:
    """Raise UnsupportedConfig for unexpected values; missing and null values pass."""
    for name, value in expected.items():
        found = hf.get(name)
        if found is not None and found != value:
            raise UnsupportedConfig(f"config.json: {name}={found} is not supported, only {value}")


def lm_word(hf: Values, name: str, table: Mapping[str, str], default: str) -> str:
    """Translate a config.json value to ours; a missing one is `default`.

    Raises:
        UnsupportedConfig: the value is not in the table.
    """
    found = hf.get(name) or default
    if not isinstance(found, str) or found not in table:
        raise UnsupportedConfig(
            f"config.json: {name}={found} is not supported, only {', '.join(table)}"
        )
    return table[found]


def hf_word(value: str, table: Mapping[str, str], key: str) -> str:
    """Translate a value of `--config.model.KEY` to Hugging Face's first word for it.

    Raises:
        UnsupportedConfig: the table has no such value.
    """
    for word, translation in table.items():
        if translation == value:
            return word
    raise UnsupportedConfig(f"model.{key}={value}")
