"""Validation of a configuration by one call, before data or devices are touched.

The rules between keys alone are in `lm/config/rules.py`; those here need the sizes of the mesh, the
platform, or the classes that the configuration names. The last of them chooses the attention
kernel: the configured one, the platform's, or an error with the reason. No slow kernel is chosen
silently: the trainer reports the choice and why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from ml_collections import ConfigDict

from lm.config import fill_defaults, validate
from lm.config.registries import MODELS, OBJECTIVES
from lm.config.rules import (
    POSITION_BIASES,
    TRANSFORMERS,
    data_problems,
    tiled_attention_problem,
)
from lm.errors import UserError
from lm.kernels.blockwise_attention import count_tiles
from lm.kernels.splash_attention import LANES
from lm.parallel.mesh import BATCH_AXES, CONFIG_KEYS, axis_sizes, count_parameter_shards

BEST_ON = {"cpu": "tiled", "tpu": "splash", "gpu": "cudnn"}
CALLED = {"cuda": "gpu", "rocm": "gpu"}  # by devices that are described and not there
PLATFORM_OF = {"splash": "tpu", "cudnn": "gpu"}
CUDNN_WIDEST_HEAD = 128


def check(config: ConfigDict, platform: str, n_devices: int) -> None:
    """Find everything that is wrong with a configuration before it trains.

    Args:
        config: configuration, resolved or not.
        platform: "cpu", "tpu" or "gpu".
        n_devices: number of devices of the mesh.

    Raises:
        UserError: the first problem of: keys, rules between keys, data, mesh, objective, attention.
    """
    validate(config)
    for problem in data_problems(config):
        raise UserError(problem)
    sizes = axis_sizes(config.parallel.preset, config.parallel.mesh, n_devices)
    check_on_mesh(fill_defaults(config, platform), platform, sizes)


def check_on_mesh(config: ConfigDict, platform: str, sizes: Mapping[str, int]) -> None:
    """Raise UserError unless a configuration can run on a mesh.

    Args:
        config: valid configuration with its defaults filled in (`fill_defaults`).
        platform: "cpu", "tpu" or "gpu".
        sizes: sizes of all mesh axes.
    """
    for rules in MESH_RULES:
        for problem in rules(config, sizes):
            raise UserError(problem)
    # Raises where its sequences are too short.
    OBJECTIVES[config.objective.name].from_config(config, None)
    choose_attention(config, platform, sizes)


def _stage_rules(config: ConfigDict, sizes: Mapping[str, int]) -> Iterator[str]:
    model, options, stages = config.model, config.parallel.pipeline, sizes["stage"]
    if stages == 1:
        return
    if model.family not in TRANSFORMERS:
        yield (
            f"--config.parallel.mesh.stage={stages} needs --config.model.family "
            f"{' or '.join(TRANSFORMERS)}, not {model.family}"
        )
    for name, plain in (("residual", "sum"), ("dense_layers", 0)):
        if model[name] != plain:
            yield (
                f"--config.parallel.mesh.stage={stages} needs layers of one shape, not "
                f"--config.model.{name}={model[name]}"
            )
    every = model.experts_every if model.n_experts else 1
    groups = stages * options.repeats * every
    stacks = ["n_layers", "n_decoder_layers"][: 1 + (model.family == "encoder_decoder")]
    for name in stacks:
        if model[name] % groups:
            yield (
                f"--config.model.{name}={model[name]} is not divisible by {groups} "
                f"({stages} --config.parallel.mesh.stage × "
                f"{options.repeats} --config.parallel.pipeline.repeats"
                + (f" × {every} --config.model.experts_every)" if every > 1 else ")")
            )
    microbatches = options.microbatches or stages
    if microbatches % stages:
        yield (
            f"--config.parallel.pipeline.microbatches={microbatches} is not a multiple of "
            f"--config.parallel.mesh.stage={stages}"
        )


def _batch_rules(config: ConfigDict, sizes: Mapping[str, int]) -> Iterator[str]:
    shards, stages = prod(sizes[axis] for axis in BATCH_AXES), sizes["stage"]
    in_pipeline = (config.parallel.pipeline.microbatches or stages) if stages > 1 else 1
    for name, accumulated in (("data", config.train.microbatches), ("eval", 1)):
        divisor = shards * accumulated * in_pipeline
        factors = [f"{shards} data-parallel devices"]
        factors += [f"{accumulated} --config.train.microbatches"] if accumulated > 1 else []
        factors += (
            [f"{in_pipeline} --config.parallel.pipeline.microbatches"] if in_pipeline > 1 else []
        )
        if config[name].batch_size % divisor:
            yield (
                f"--config.{name}.batch_size={config[name].batch_size} is not divisible by "
                f"{divisor} ({' × '.join(factors)})"
            )


def _length_rules(config: ConfigDict, sizes: Mapping[str, int]) -> Iterator[str]:
    context, tensor = sizes["context"], sizes["tensor"]
    if context > 1 and config.model.family not in TRANSFORMERS:
        yield (
            f"--config.parallel.mesh.context={context} needs attention: "
            f"--config.model.family={config.model.family} has none over the sequence"
        )
    # The ring gives every device two chunks of the sequence, so that causal work is even.
    divisors = {"2 × --config.parallel.mesh.context": 2 * context if context > 1 else 1}
    if config.parallel.sequence:
        product = "--config.parallel.mesh.context × --config.parallel.mesh.tensor"
        divisors[product] = context * tensor
    for name in OBJECTIVES[config.objective.name].length_keys:
        for what, n in divisors.items():
            if config.data[name] % n:
                yield f"--config.data.{name}={config.data[name]} is not divisible by {n} ({what})"


def _parameter_rules(config: ConfigDict, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield the dimensions of parameters that the mesh does not divide."""
    names = [] if MODELS.entries[config.model.family].plugin else ["embed"]
    if config.model.family in TRANSFORMERS:
        names += ["heads", "mlp"]
    if config.model.n_experts:
        names += ["experts"]
    elif sizes["expert"] > 1:
        yield (
            f"--config.parallel.mesh.expert={sizes['expert']}: the model has no experts "
            "(--config.model.n_experts=0); use data or fsdp"
        )
    for name in names:
        section, _, key = CONFIG_KEYS[name].partition(".")
        try:
            count_parameter_shards(sizes, (name,), (config[section][key],))
        except UserError as error:
            yield str(error)


MESH_RULES = (_stage_rules, _batch_rules, _length_rules, _parameter_rules)


# --- attention kernel


@dataclass(frozen=True)
class AttentionChoice:
    """Attention kernel, and how it reaches the keys of other parts of the sequence.

    Attributes:
        kernel: name of the kernel.
        across: "ring" or "gather"; "" where sequences are whole.
        why: reason, for the user.
    """

    kernel: str
    across: str
    why: str


def choose_attention(
    config: ConfigDict, platform: str, sizes: Mapping[str, int]
) -> AttentionChoice:
    """Choose the attention kernel.

    "auto" takes the platform's own kernel if that can run, else "xla"; and ring attention if the
    kernel supports it.

    Args:
        config: valid configuration with its defaults filled in.
        platform: "cpu", "tpu" or "gpu".
        sizes: sizes of all mesh axes.

    Raises:
        UserError: no kernel that the configuration allows can run.
    """
    platform = CALLED.get(platform, platform)
    named, across = config.model.attention, config.parallel.context_attention
    kernels = (BEST_ON[platform], "xla") if named == "auto" else (named,)
    ways = ("ring", "gather") if across == "auto" else (across,)
    ways = ways if sizes["context"] > 1 else ("",)
    problems: list[str] = []
    for kernel in kernels:
        for way in ways:
            problem = next(_problems(kernel, way, config, platform, sizes), "")
            if not problem:
                return AttentionChoice(kernel, way, _why(named, kernel, platform, problems))
            problems.append(f"{kernel} cannot be used with {problem}")
    raise UserError(f"--config.model.attention={problems[-1]}: use auto, or change that")


def _why(named: str, kernel: str, platform: str, problems: list[str]) -> str:
    if named != "auto":
        return "as configured"
    best = BEST_ON[platform]
    return f"the one for {platform}" if kernel == best else problems[0]


def _problems(
    kernel: str, across: str, config: ConfigDict, platform: str, sizes: Mapping[str, int]
) -> Iterator[str]:
    """Yield the settings that keep a kernel from running, as the end of "cannot be used with"."""
    model, context = config.model, sizes["context"]
    if model.family not in TRANSFORMERS:
        if kernel != "xla":
            yield f"--config.model.family={model.family}"
        return
    ring = across == "ring"
    if PLATFORM_OF.get(kernel, platform) != platform:
        yield f"{platform} devices"
    if context > 1 and kernel in ("tiled", "blockwise", "cudnn"):
        yield f"--config.parallel.mesh.context={context}"
    if ring and kernel != "xla":
        yield "--config.parallel.context_attention=ring"
    if kernel == "tiled" and (problem := tiled_attention_problem(config)):
        yield problem
    if kernel in ("blockwise", "cudnn", "splash") or ring:
        if model.attention_dropout:
            yield _ring_or(ring, f"--config.model.attention_dropout={model.attention_dropout}")
        if model.positions in POSITION_BIASES:
            yield _ring_or(ring, f"--config.model.positions={model.positions}")
        if model.window and (kernel == "blockwise" or ring):
            yield _ring_or(ring, f"--config.model.window={model.window}")
        if model.attention_softcap and (kernel != "splash" or ring):
            yield _ring_or(ring, f"--config.model.attention_softcap={model.attention_softcap}")
    if (kernel in ("blockwise", "splash") or ring) and OBJECTIVES[config.objective.name].has_prefix:
        yield _ring_or(ring, f"--config.objective.name={config.objective.name}")
    if kernel == "cudnn":
        if model.dtype != "bfloat16":
            yield f"--config.model.dtype={model.dtype}"
        if model.head_dim % 8 or model.head_dim > CUDNN_WIDEST_HEAD:
            yield f"--config.model.head_dim={model.head_dim} (a multiple of 8 up to 128)"
    for name, length in OBJECTIVES[config.objective.name].attention_lengths(config).items():
        if ring and length % (2 * context):
            yield f"--config.parallel.context_attention=ring and {name} ({length} tokens)"
        if kernel == "splash" and length % (parts := LANES * (2 * context if context > 1 else 1)):
            yield f"{name}: {length} tokens, not a multiple of {parts}"
        if kernel == "blockwise" and not count_tiles(length):
            yield f"{name}: {length} tokens, which has no divisor between 64 and 512"


def _ring_or(ring: bool, problem: str) -> str:
    return f"--config.parallel.context_attention=ring and {problem}" if ring else problem
