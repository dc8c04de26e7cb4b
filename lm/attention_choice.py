"""Choice of the attention kernel: the configured one, the platform's, or an error with the reason.

No slow kernel is chosen silently: the trainer reports the choice and why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ml_collections import ConfigDict

from lm.config.registries import OBJECTIVES
from lm.config.rules import POSITION_BIASES, TRANSFORMERS, tiled_attention_problem
from lm.errors import UserError
from lm.kernels.blockwise_attention import count_tiles
from lm.kernels.splash_attention import LANES

BEST_ON = {"cpu": "tiled", "tpu": "splash", "gpu": "cudnn"}
CALLED = {"cuda": "gpu", "rocm": "gpu"}  # by devices that are described and not there
PLATFORM_OF = {"splash": "tpu", "cudnn": "gpu"}
CUDNN_WIDEST_HEAD = 128


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
