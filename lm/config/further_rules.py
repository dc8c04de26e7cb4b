"""Validation rules for rarely set keys.

Covers lists of names, single labels, best checkpoints, profiles, canaries, ramps,
quantization-aware training and schedule-free learning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from lm.config.ramps import ramp_problems
from lm.config.registries import LISTS, TRANSFORMERS
from lm.config.registry import config_value, listed


def further_problems(config: ConfigDict) -> Iterator[str]:
    """Yield an error message for each violated rule; a config with default values violates none."""
    for registry in LISTS:
        (path,) = registry.keys_of_names
        chosen = config_value(config, path)
        for name in listed(chosen):
            if name not in registry:
                yield f"--config.{path}={chosen}: {registry.unknown(name)}"
    for name in ("max_batches", "final_batches"):
        if config.eval.best and config.eval[name]:
            yield (
                f"--config.eval.best={config.eval.best} compares whole evaluations: "
                f"--config.eval.{name}={config.eval[name]} must be 0"
            )
    if config.train.profile and not re.fullmatch(r"[0-9]+:[1-9][0-9]*", config.train.profile):
        yield f"--config.train.profile={config.train.profile}: expected START:STEPS, as in 100:5"
    of_labels = config.objective.name in ("classification", "token_classification")
    if of_labels and len(listed(config.data.labels)) == 1 and not config.model.n_classes:
        yield (
            f"--config.data.labels={config.data.labels}: a single class leaves nothing to learn; "
            "name all classes, or none for a number"
        )
    yield from ramp_problems(config)
    if config.data.canaries:
        yield from _canary_problems(config.data)
    if config.train.precision == "qat":
        if config.decode.weights == "auto":
            yield "--config.train.precision=qat rounds by --config.decode.weights: set int4 or int8"
        if config.lora.rank:
            yield "--config.train.precision=qat rounds whole kernels: leave --config.lora.rank at 0"
    if config.optimizer.qk_clip:
        yield from _qk_clip_problems(config)
    if config.optimizer.name == "schedule_free":
        yield from _schedule_free_problems(config)


def _qk_clip_problems(config: ConfigDict) -> Iterator[str]:
    model, named = config.model, f"--config.optimizer.qk_clip={config.optimizer.qk_clip:g}"
    if model.family not in TRANSFORMERS:
        yield f"{named} is not supported with --config.model.family={model.family}"
    if model.mixer not in ("attention", "mla") and not model.attention_layers:
        yield f"{named} is not supported with --config.model.mixer={model.mixer}"
    excluded = (
        *("model.qk_norm", "model.rope_norm"),  # norms undo any scaling of the weights
        *("lora.rank", "optimizer.ema"),  # logits do not use the trained parameters themselves
    )
    for path in excluded:
        if value := config_value(config, path):
            yield f"{named} cannot be combined with --config.{path}={value}"
    for path, value in (("optimizer.name", "schedule_free"), ("train.precision", "qat")):
        if config_value(config, path) == value:
            yield f"{named} cannot be combined with --config.{path}={value}"


def _schedule_free_problems(config: ConfigDict) -> Iterator[str]:
    optimizer, schedule = config.optimizer, config.schedule.name
    if schedule != "constant":
        yield (
            "--config.optimizer.name=schedule_free averages instead of lowering the rate: set "
            f"--config.schedule.name=constant, not {schedule}"
        )
    if optimizer.ema:
        yield (
            f"--config.optimizer.ema={optimizer.ema}: --config.optimizer.name=schedule_free "
            "already averages"
        )


def _canary_problems(data: ConfigDict) -> Iterator[str]:
    form, digits = data.canary_format, data.canary_format.count("#")
    where = f"--config.data.canary_format={form!a}"
    if not form.isprintable() or form != form.strip():
        yield f"{where} must be one line, without surrounding spaces"
    if not 1 <= digits <= 15 or 10**digits < 2 * data.canaries:
        yield (
            f"{where} has {digits} digits (#): use 1 to 15, enough for twice "
            f"--config.data.canaries={data.canaries}"
        )
    repeats = list(data.canary_repeats)
    if not repeats or not all(n == int(n) and 1 <= n <= 1e6 for n in repeats):
        yield (
            f"--config.data.canary_repeats={','.join(map(str, repeats))}: expected numbers of "
            "1 or more"
        )
