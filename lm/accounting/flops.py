"""Model FLOPs of a training step.

Counts the forward and backward pass over one example, including padding, without recomputation. The
sum has two terms:

    6 × size × tokens, for every kernel and the tokens that pass through it. A tied token table
    counts once, as output matrix; embedding look-ups count nothing; only the experts that a token
    uses count, whether it is dropped or not.

    12 × layers × heads × head_dim × (query, key) pairs, for the two products of attention; if
    queries and values have different widths, head_dim is their mean. Causal attention counts the
    unmasked half of the pairs (the dense convention counts all), a window or chunk the pairs inside
    it, encoders and cross-attention all pairs.

Skip-gram: 6 × d_model × (window + 1 pairs per word) × (1 + negatives).
"""

from __future__ import annotations

import jax

from lm.config.registries import MIXERS
from lm.experiment import Experiment
from lm.hardware import PEAK_FLOPS
from lm.models.layer_patterns import global_layers
from lm.models.variables import KERNELS, flat


def model_flops_per_token(experiment: Experiment) -> float:
    """Return the FLOPs of a training step on one example, divided by `tokens_per_row`."""
    m = experiment.config.model
    if m.family == "skip_gram":
        o = experiment.config.objective
        return 6.0 * m.d_model * (o.window + 1) * (1 + o.negatives)
    tokens = stream_tokens(experiment)
    multiplied = 0.0
    for path, leaf in flat(experiment.param_shapes).items():
        role = experiment.param_infos[path].role
        if role.kind in KERNELS or role.tied:
            multiplied += leaf.size * used_share(experiment, path) * tokens[role.stream]
    return 6.0 * (multiplied + 2 * _attention(experiment, tokens)) / tokens_per_row(experiment)


def tokens_per_row(experiment: Experiment) -> int:
    """Return the tokens per example: of source and target, or of the single sequence."""
    tokens = stream_tokens(experiment)
    has_target = "source" in experiment.objective.shapes
    return tokens["source"] + (tokens["target"] if has_target else 0)


def stream_tokens(experiment: Experiment) -> dict[str, int]:
    """Return the tokens per example by `Role.stream`; for audio, frames."""
    sizes = {name: shape[0] for name, (shape, _) in experiment.objective.shapes.items() if shape}
    length = experiment.config.data.sequence_length
    return {
        "frames": sizes.get("source", length),
        "source": length if "source" in sizes else sizes.get("inputs", length),
        "target": sizes.get("inputs", length),
        "predicted": sizes.get("targets", 0),
        "text": 1,
    }


def _attention(experiment: Experiment, tokens: dict[str, int]) -> float:
    """Return the multiplications in one of the two forward attention products."""
    m, source, target = experiment.config.model, tokens["source"], tokens["target"]
    # Token mixers without such products are counted by their kernels alone.
    share = len(m.attention_layers) / m.n_layers or 1  # fraction of layers
    width = share * m.n_heads * sum(MIXERS[m.mixer].head_widths(m)) / 2
    causal, both_ways, cross = target**2 / 2, source**2, source * target
    n_global = global_layers(m, m.n_layers).sum() if m.window else m.n_layers
    n_local, window = m.n_layers - n_global, min(m.window or target, target)
    local = causal - (target - window) ** 2 / 2
    if m.window_chunks:
        local = (target // window * window**2 + (target % window) ** 2) / 2
    near = both_ways - (source - min(m.window // 2, source)) ** 2
    return {
        "decoder": width * (n_global * causal + n_local * local),
        "encoder": width * (n_global * both_ways + n_local * near),
        "encoder_decoder": width * (m.n_layers * both_ways + m.n_decoder_layers * (causal + cross)),
        "lstm_encoder_decoder": m.d_hidden * cross,
    }.get(m.family, 0) + m.copy * (m.d_hidden or m.d_model) * cross / 2


def used_share(experiment: Experiment, path: str) -> float:
    """Return the fraction of a parameter that a token uses."""
    model = experiment.config.model
    is_expert = experiment.param_infos[path].role.expert
    return model.experts_per_token / model.n_experts if is_expert else 1.0


def peak_flops(device: jax.Device) -> float | None:
    """Return the published bfloat16 FLOP/s of a device; None if unknown (CPUs)."""
    matches = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None
