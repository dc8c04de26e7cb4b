"""Validation rules for models beyond a plain decoder: families, positions, experts, muP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from lm.config.registries import OBJECTIVES, SCHEMA, STATE_SPACES, TRANSFORMERS
from lm.config.registry import config_value

_PATTERNS = {  # layer lists, and the keys that exclude them
    "global_layers": ("global_every", "global_first"),
    "nope_layers": ("nope_every",),
    "expert_layers": ("experts_every", "dense_layers"),
}
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


def model_problems(config: ConfigDict) -> Iterator[str]:
    """Yield an error message for each violated rule that involves section "model".

    A model with the defaults of `FURTHER_MODEL_KEYS` (`rules.py`) violates none of them.
    """
    parts = (_shape_rules, _audio_rules, _mixer_rules, _expert_rules, _window_rules, _mup_rules)
    for rules in parts:
        yield from rules(config)
    yield from rotary_problems(config.model)


def _shape_rules(config: ConfigDict) -> Iterator[str]:
    model = config.model
    transformer = model.family in TRANSFORMERS
    if model.positions == "sinusoidal" and model.d_model % 2:
        yield "--config.model.positions=sinusoidal needs an even --config.model.d_model"
    has_table = model.positions in ("relative", "disentangled")
    if has_table and model.relative_max_distance <= (least := least_distance(model)):
        yield (
            f"--config.model.relative_max_distance={model.relative_max_distance} must be above "
            f"{least} with --config.model.relative_buckets={model.relative_buckets}"
        )
    if transformer and model.init == "uniform":
        yield (
            "--config.model.init=uniform is not supported with "
            f"--config.model.family={model.family}"
        )
    if model.pooling == "mean" and not transformer:
        yield (
            "--config.model.pooling=mean is not supported with "
            f"--config.model.family={model.family}"
        )
    if model.pooling == "shifted" and model.family != "encoder_decoder":
        yield (
            "--config.model.pooling=shifted is not supported with "
            f"--config.model.family={model.family}"
        )
    if model.init == "uniform" and model.init_truncated:
        yield "--config.model.init=uniform cannot be truncated: unset --config.model.init_truncated"
    objective = OBJECTIVES.entries[config.objective.name]
    if model.bidirectional and model.family == "lstm" and objective.predicts_every_token:
        yield "--config.model.bidirectional would let a causal model see its targets"
    if model.bidirectional and (model.d_hidden or model.d_model) % 2:
        yield "--config.model.bidirectional needs an even --config.model.d_hidden"
    if model.family == "lstm_encoder_decoder" and model.n_decoder_layers not in (0, model.n_layers):
        yield (
            "--config.model.n_decoder_layers must be --config.model.n_layers for "
            "lstm_encoder_decoder: each layer starts from the state of its encoder layer"
        )
    for name, plain in (("residual", "sum"), ("value_residual", "none")):
        named = f"--config.model.{name}={model[name]}"
        if model[name] != plain and not transformer:
            yield f"{named} is not supported with --config.model.family={model.family}"
        if model[name] != plain and model.norm_placement == "post":
            yield f"{named} is not supported with --config.model.norm_placement=post"
    if model.value_residual != "none" and model.mixer != "attention":
        yield (
            f"--config.model.value_residual={model.value_residual} is not supported with "
            f"--config.model.mixer={model.mixer}"
        )
    for name in ("attention_sinks", "attention_gate", *MULTIPLIERS):
        if model[name] != SCHEMA[f"model.{name}"].default and not transformer:
            yield (
                f"--config.model.{name} is not supported with --config.model.family={model.family}"
            )
    if model.embedding_size and (model.mup_base_width or not transformer):
        yield (
            f"--config.model.embedding_size={model.embedding_size} is not supported with "
            + (
                "--config.model.mup_base_width"
                if transformer
                else f"--config.model.family={model.family}"
            )
        )
    if model.embedding_size and model.projection_first:
        for key, wanted in (("model.family", "encoder"), ("model.embedding_norm", True)):
            if config_value(config, key) != wanted:
                yield f"--config.model.projection_first needs --config.{key}={wanted}"
    if config.objective.name == "replaced_tokens":
        yield from _generator_rules(config)
    if model.n_encoder_heads:
        yield from _encoder_rules(model)
    if model.separate_tokens and model.tie_embeddings:
        yield "--config.model.separate_tokens is for --config.model.tie_embeddings=false"
    if model.first_conv and (model.first_conv % 2 == 0 or model.norm_placement != "post"):
        yield (
            f"--config.model.first_conv={model.first_conv} is for an odd number of tokens and "
            f"--config.model.norm_placement=post, not {model.norm_placement}"
        )
    if model.dense_layers and not model.n_experts:
        yield f"--config.model.dense_layers={model.dense_layers} needs --config.model.n_experts"


def _encoder_rules(model: ConfigDict) -> Iterator[str]:
    named = f"--config.model.n_encoder_heads={model.n_encoder_heads}"
    width = model.n_heads * (model.head_dim or model.d_model // model.n_heads)
    if width % model.n_encoder_heads:
        yield f"{named} does not divide the total head width {width}"
    elif model.positions == "rotary" and width // model.n_encoder_heads % 2:
        yield f"{named} gives heads of odd width: --config.model.positions=rotary needs an even one"
    if model.n_kv_heads not in (0, model.n_heads):
        yield f"{named} is not supported with --config.model.n_kv_heads={model.n_kv_heads}"
    if model.mixer != "attention":
        yield f"{named} is not supported with --config.model.mixer={model.mixer}"


def _audio_rules(config: ConfigDict) -> Iterator[str]:
    model = config.model
    if not model.n_mels:
        return
    objective = OBJECTIVES.entries[config.objective.name]
    if "audio" not in objective.columns and not objective.plugin:
        yield (
            "--config.model.n_mels is not supported with "
            f"--config.objective.name={config.objective.name}"
        )
    if model.positions in ("learned", "sinusoidal") and (model.d_model % 2 or model.d_model < 4):
        yield (
            f"--config.model.d_model={model.d_model} must be even and above 2 for the sinusoidal "
            "positions of --config.model.n_mels"
        )
    for name in ("separate_embeddings", "separate_tokens", "mup_base_width", "copy"):
        if model[name]:
            yield f"--config.model.{name} is not supported with --config.model.n_mels"


def _generator_rules(config: ConfigDict) -> Iterator[str]:
    model, width = config.model, config.model.generator_width
    for key in ("objective.next_sentence", "model.projection_first"):
        if config_value(config, key):
            yield f"--config.{key} is not supported with --config.objective.name=replaced_tokens"
    for name in ("n_heads", "n_kv_heads", "d_ff", "n_experts"):
        size = model[name] or (4 * model.d_model if name == "d_ff" else 0)
        if name == "n_experts" and size:
            yield (
                "--config.objective.name=replaced_tokens does not support --config.model.n_experts"
            )
        elif size * width % model.d_model:
            yield (
                f"--config.model.generator_width={width}: relative to "
                f"--config.model.d_model={model.d_model}, it does not scale "
                f"--config.model.{name}={size} to an integer"
            )


def _mixer_rules(config: ConfigDict) -> Iterator[str]:
    model = config.model
    if not model.feed_forward:
        for name, value in (("residual", "concat"), ("n_experts", model.n_experts or None)):
            if model[name] == value:
                yield f"--config.model.{name}={value} needs --config.model.feed_forward"
    layers = model.attention_layers
    if layers and model.mixer == "attention":
        yield "--config.model.attention_layers needs another --config.model.mixer than attention"
    for name in ("attention_layers", "global_layers", "nope_layers", "expert_layers"):
        if len({*model[name]} & {*range(model.n_layers)}) < len(model[name]):
            yield (
                f"--config.model.{name}={','.join(f'{x:g}' for x in model[name])}: expected "
                f"different numbers from 0 to {model.n_layers - 1}"
            )
    for name, others in _PATTERNS.items():
        for other in others:
            if model[name] and model[other] != SCHEMA[f"model.{other}"].default:
                yield f"--config.model.{name} and --config.model.{other} are mutually exclusive"
    if model.mixer in STATE_SPACES:
        yield from _state_space_rules(config)
    if (model.mixer == "disentangled") != (model.positions == "disentangled"):
        yield (
            "--config.model.mixer=disentangled and --config.model.positions=disentangled need each "
            f"other, not {model.mixer} and {model.positions}"
        )
    if model.mixer == "disentangled":
        if model.family != "encoder":
            yield (
                "--config.model.mixer=disentangled needs --config.model.family=encoder, not "
                f"{model.family}"
            )
        if model.relative_buckets % 2:
            yield f"--config.model.relative_buckets={model.relative_buckets} is odd"
        for name in (
            *("qk_norm", "attention_softcap", "attention_sinks", "window", "mup_base_width"),
            "attention_gate",
        ):
            if model[name]:
                yield (
                    f"--config.model.{name} is not supported with --config.model.mixer=disentangled"
                )
    if model.mixer not in ("mla", "disentangled"):
        return
    if model.n_kv_heads not in (0, model.n_heads):
        yield (
            f"--config.model.n_kv_heads={model.n_kv_heads}: with --config.model.mixer="
            f"{model.mixer} each of {model.n_heads} heads has its own keys and values"
        )
    if model.mixer != "mla":
        return
    if model.family not in TRANSFORMERS:
        yield f"--config.model.mixer=mla is not supported with --config.model.family={model.family}"
    if model.qk_norm:
        yield (
            "--config.model.qk_norm is not supported with --config.model.mixer=mla, which "
            "normalizes latents"
        )
    for name in ("attention_sinks", "attention_gate", "rope_norm", "nope_temperature"):
        if model[name]:
            yield (
                f"--config.model.{name}={model[name]} is not supported with "
                "--config.model.mixer=mla"
            )


def _state_space_rules(config: ConfigDict) -> Iterator[str]:
    model, named = config.model, f"--config.model.mixer={config.model.mixer}"
    if model.family != "decoder":
        yield f"{named} is not supported with --config.model.family={model.family}"
    objective = config.objective.name
    if OBJECTIVES.entries[objective].has_prefix:
        yield f"{named} is not supported with --config.objective.name={objective}"
    if model.ssm_heads % model.ssm_groups:
        yield (
            f"--config.model.ssm_heads={model.ssm_heads} is not divisible by "
            f"--config.model.ssm_groups={model.ssm_groups}"
        )


def least_distance(model: Any) -> int:
    """Return the largest distance with a separate bucket; for `model` see `rotary_width`."""
    n = model.relative_buckets
    return n // 4 + 1 if model.positions == "disentangled" else n // 2


def rotary_width(model: Any) -> int:
    """Return the number of dimensions per head that RoPE rotates.

    Args:
        model: section "model", or a TransformerConfig.
    """
    return int((model.head_dim or model.d_model // model.n_heads) * model.rope_fraction)


def rotary_problems(model: Any) -> Iterator[str]:
    """Yield an error message for each violated rule between RoPE keys.

    Args:
        model: section "model", or a TransformerConfig.
    """
    scaling = model.rope_scaling
    width = rotary_width(model)
    if model.rope_fraction != 1 and (width < 2 or width % 2 or model.rope_fraction > 1):
        yield (
            f"--config.model.rope_fraction={model.rope_fraction} rotates {width} dimensions per "
            "head, which must be even, above 0 and within the head"
        )
    low, high = model.rope_low_frequency, model.rope_high_frequency
    if high < low if scaling == "llama3" else scaling == "yarn" and high <= low:
        yield (
            f"--config.model.rope_high_frequency={high} must be above "
            f"--config.model.rope_low_frequency={low}"
        )
    if scaling == "yarn" and model.rope_theta <= 1:
        yield "--config.model.rope_scaling=yarn needs --config.model.rope_theta above 1"
    if scaling == "dynamic" and width < 4:
        yield f"--config.model.rope_scaling=dynamic needs heads of 4 or more, not {width}"
    shortest = 2 if scaling == "longrope" else 1
    if scaling != "none" and model.rope_original_length < shortest:
        yield f"--config.model.rope_original_length must be {shortest} or more"
    if scaling == "longrope":
        for name in ("rope_short_factor", "rope_long_factor"):
            factors = getattr(model, name)
            if len(factors) != width // 2 or not all(0 < f < float("inf") for f in factors):
                yield (
                    f"--config.model.{name}: expected {width // 2} positive numbers, half of "
                    f"head_dim, not {len(factors)}: {' '.join(map(str, factors[:4]))}"
                )


def _expert_rules(config: ConfigDict) -> Iterator[str]:
    model = config.model
    if not model.n_experts:
        return
    if model.family not in TRANSFORMERS:
        yield f"--config.model.n_experts is not supported with --config.model.family={model.family}"
    if model.experts_per_token > model.n_experts:
        yield (
            f"--config.model.experts_per_token={model.experts_per_token} is above "
            f"--config.model.n_experts={model.n_experts}"
        )
    yield from _group_problems(model)
    for name in ("n_layers", "n_decoder_layers"):
        if not model[name]:
            continue
        if model.dense_layers >= model[name]:
            yield (
                f"--config.model.dense_layers={model.dense_layers} leaves no MoE layer: "
                f"--config.model.{name}={model[name]}"
            )
        elif (model[name] - model.dense_layers) % model.experts_every:
            less = " less --config.model.dense_layers" if model.dense_layers else ""
            yield (
                f"--config.model.{name}={model[name]}{less} is not divisible by "
                f"--config.model.experts_every={model.experts_every}"
            )
    if model.activation_dropout:
        yield "--config.model.activation_dropout is not supported with --config.model.n_experts"


def _group_problems(model: ConfigDict) -> Iterator[str]:
    """Yield an error message for each violated rule of group-limited expert routing."""
    groups, chosen = model.expert_groups, model.expert_groups_per_token
    if not groups:
        return
    named = f"--config.model.expert_groups={groups}"
    if model.n_experts % groups:
        yield f"--config.model.n_experts={model.n_experts} is not divisible by {named}"
        return
    size = model.n_experts // groups
    if not 1 <= chosen <= groups:
        yield f"--config.model.expert_groups_per_token={chosen}: expected 1 to {groups}, of {named}"
    elif model.experts_per_token > chosen * size:
        yield (
            f"--config.model.experts_per_token={model.experts_per_token} is above the {size} "
            f"experts of --config.model.expert_groups_per_token={chosen} groups each"
        )
    if model.expert_group_best > size:
        yield (
            f"--config.model.expert_group_best={model.expert_group_best} is above the {size} "
            f"experts of a group: {named}"
        )


def _window_rules(config: ConfigDict) -> Iterator[str]:
    model = config.model
    if model.window and model.family not in ("decoder", "encoder"):
        yield (
            f"--config.model.window={model.window} is not supported with "
            f"--config.model.family={model.family}"
        )
    if model.window_chunks and model.family == "encoder":
        yield "--config.model.window_chunks is not supported with --config.model.family=encoder"
    if not model.first_norm and (
        model.norm_placement not in ("pre", "both") or model.family not in TRANSFORMERS
    ):
        yield (
            "--config.model.first_norm=false needs --config.model.norm_placement=pre or both and "
            f"--config.model.family={' or '.join(TRANSFORMERS)}, not {model.norm_placement} and "
            f"{model.family}"
        )
    if model.residual == "parallel" and not (model.first_norm and model.norm_placement != "output"):
        yield (
            "--config.model.residual=parallel needs a norm of each block's input: not "
            f"--config.model.norm_placement={model.norm_placement} with "
            f"--config.model.first_norm={model.first_norm}"
        )
    for name in ("global_every", "global_layers", "rope_theta_local", "window_chunks"):
        if model[name] and not model.window:
            yield f"--config.model.{name}={model[name]} needs --config.model.window"


def _mup_rules(config: ConfigDict) -> Iterator[str]:
    model = config.model
    if model.mup_base_head_dim and not model.mup_base_width:
        yield (
            f"--config.model.mup_base_head_dim={model.mup_base_head_dim} needs "
            "--config.model.mup_base_width"
        )
    if not model.mup_base_width:
        return
    if model.family not in TRANSFORMERS:
        yield (
            "--config.model.mup_base_width is not supported with "
            f"--config.model.family={model.family}"
        )
    known = ("adamw", "muon", "ademamix", "schedule_free")
    if config.optimizer.name not in known:
        yield (
            f"--config.model.mup_base_width needs --config.optimizer.name {', '.join(known[:-1])} "
            f"or {known[-1]}, not {config.optimizer.name}"
        )
