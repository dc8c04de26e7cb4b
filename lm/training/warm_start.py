"""Warm start: initialize parameters from another run or from word vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from lm.config.patterns import rename_rules
from lm.data.files import find_file
from lm.data.tokenizer import Tokenizer
from lm.data.tokenizers.basic import WordTokenizer
from lm.data.word_vectors import load_vectors, pretrained_embeddings, vocabulary_words
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.frozen import is_frozen
from lm.models.lora import SCALES, kernel_of, quantize_loaded
from lm.models.parameter_groups import matching
from lm.models.variables import flat, nested
from lm.qk_clip import is_largest_logits
from lm.runs.checkpoints import Log
from lm.runs.saved_params import (
    SavedCheckpoint,
    load_tokenizer,
    mean_params,
    saved_checkpoints,
)
from lm.storage import open_run_folder, resolve_path
from lm.train_step import TrainState
from lm.training.frozen_models import with_frozen_models


@dataclass(frozen=True)
class ParamMapping:
    """Mapping from source parameters to the parameters of this run.

    Attributes:
        loaded: source name of each loaded parameter.
        fresh: parameters that keep their fresh initialization.
        left: source names that are not used.
    """

    loaded: Mapping[str, str]
    fresh: Sequence[str]
    left: Sequence[str]


def initial_state(experiment: Experiment, tokenizer: Tokenizer, log: Log) -> TrainState:
    """Return the initial state, with parameters of `init.from` or `init.vectors`.

    Frozen models are included: the reference (a copy of the initial parameters) and the teacher.

    Args:
        experiment: the experiment.
        tokenizer: its tokenizer.
        log: called with what was loaded, left fresh and left out.

    Raises:
        UserError: parameters do not match and the configuration does not allow it, or a token table
            was trained with another tokenizer.
    """
    state = experiment.init_state()
    if experiment.config.init.vectors:
        state = _with_vectors(experiment, state, tokenizer, log)
    if experiment.config.init["from"]:
        state = _warm_started(experiment, state, tokenizer, log)
    return with_frozen_models(experiment, state, tokenizer, log)


def _warm_started(
    experiment: Experiment, state: TrainState, tokenizer: Tokenizer, log: Log
) -> TrainState:
    """Return the state with the parameters of `init.from`."""
    options = experiment.config.init
    checkpoints = saved_checkpoints(resolve_path(options["from"]), log)
    params = flat(state.inference_params)
    shardings = flat(experiment.inference_sharding)
    n_shared = _shared_ids(tokenizer, checkpoints[0])
    axes = _vocabulary_axes(experiment) if n_shared else {}
    plan = map_parameters(options, params, checkpoints[0].shapes, axes)
    if not n_shared:
        _check_tokenizer(experiment, plan, checkpoints[0], tokenizer.digest)
    for path in plan.loaded:
        params[path].delete()  # so that old and new parameters need not fit in memory together
    targets = {path: shardings[path] for path in plan.loaded}
    targets |= {path: _without(axes[path], targets[path]) for path in plan.loaded if path in axes}
    found, steps = mean_params(
        checkpoints,
        options.average,
        {name: targets[path] for path, name in plan.loaded.items()},
        log,
    )
    loaded = {path: found[name] for path, name in plan.loaded.items()}
    log(_describe(options["from"], steps, plan, sum(x.size for x in loaded.values())))
    resized = {
        path: _with_mean_rows(loaded[path], axis, n_shared, params[path], shardings[path])
        for path, axis in axes.items()
        if path in loaded
    }
    if resized and n_shared < tokenizer.vocab_size:
        log(
            f"rows of ids from {n_shared} on (tokens added to its tokenizer) are the mean of the "
            f"other rows: {', '.join(resized)}"
        )
    kept = quantize_loaded(loaded | resized, shardings, experiment.param_infos)
    return state.with_inference_params(nested(params | kept))


def _shared_ids(tokenizer: Tokenizer, source: SavedCheckpoint) -> int:
    """Return the vocabulary size of a source that this tokenizer extends; 0 if it extends none."""
    if source.metadata["fingerprint"]["tokenizer"] in ("", tokenizer.digest):
        return 0
    from lm.data.chat.extended_tokenizer import ExtendedTokenizer

    folder = source.folder.parent.parent
    if not isinstance(tokenizer, ExtendedTokenizer) or not (folder / "tokenizer").is_dir():
        return 0
    return tokenizer.shared_ids(load_tokenizer(open_run_folder(str(folder))))


def _vocabulary_axes(experiment: Experiment) -> dict[str, int]:
    """Return the vocabulary axis of each parameter that has one, by path."""
    infos = experiment.param_infos
    return {path: info.axes.index("vocab") for path, info in infos.items() if "vocab" in info.axes}


def _without(axis: int, sharding: NamedSharding) -> NamedSharding:
    """Return a sharding with one axis, whose size may differ, unsharded."""
    spec = [*sharding.spec, *[None] * (axis + 1 - len(sharding.spec))]
    spec[axis] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _with_mean_rows(
    old: jax.Array, axis: int, n_kept: int, new: Any, sharding: NamedSharding
) -> jax.Array:
    """Resize the vocabulary axis of a parameter; new rows are the mean of the kept ones.

    Args:
        old: source parameter.
        axis: vocabulary axis.
        n_kept: number of rows to keep.
        new: array or shape of the result.
        sharding: sharding of the result.
    """
    n_kept = min(n_kept, old.shape[axis], new.shape[axis])
    shape = (*old.shape[:axis], new.shape[axis] - n_kept, *old.shape[axis + 1 :])

    def resize(old: jax.Array) -> jax.Array:
        kept = jax.lax.slice_in_dim(old, 0, n_kept, axis=axis)
        mean = jnp.broadcast_to(kept.mean(axis, jnp.float32, keepdims=True), shape)
        return jnp.concatenate([kept, mean.astype(old.dtype)], axis)

    return jax.jit(resize, out_shardings=sharding)(old)


def _with_vectors(
    experiment: Experiment, state: TrainState, tokenizer: Tokenizer, log: Log
) -> TrainState:
    """Return the state with token embeddings from a GloVe file."""
    from lm.evaluation.word_scores import token_table  # imports SciPy

    config = experiment.config
    vectors = load_vectors(find_file(config.init.vectors, config.data))
    width = vectors.vectors.shape[1]
    if width != config.model.d_model:
        raise UserError(
            f"{config.init.vectors} has vectors of dimension {width}: "
            f"set --config.model.d_model={width}"
        )
    words = tokenizer.words if isinstance(tokenizer, WordTokenizer) else vocabulary_words(tokenizer)
    rows, std = config.model.vocab_size, config.model.init_std
    table, n_found = pretrained_embeddings(vectors, words, rows, std, config.seed)
    log(f"{config.init.vectors}: vectors for {n_found} of {len(words)} words")
    params, shardings = flat(state.params), flat(experiment.state_sharding.params)
    path = token_table(experiment.param_infos)
    params[path] = jax.device_put(table, shardings[path])
    return replace(state, params=nested(params))


def map_parameters(
    options: ConfigDict,
    params: Mapping[str, Any],
    source: Mapping[str, Any],
    resizable: Mapping[str, int] = MappingProxyType({}),
) -> ParamMapping:
    """Match source parameters with the parameters of this run.

    QK-clip's largest logits are ignored, because they are 0 between steps.

    Args:
        options: section "init" of the configuration.
        params: arrays or shapes of this run by path, including model state.
        source: arrays or shapes of the source by path.
        resizable: axis whose size may differ, for some parameters of this run.

    Raises:
        UserError: a name or shape does not match, and the options do not allow it.
    """
    beside = {path for path in params if kernel_of(path) or is_frozen(path)}
    beside |= set(filter(is_largest_logits, params))
    source = {name: leaf for name, leaf in source.items() if not is_largest_logits(name)}
    base = {path: leaf for path, leaf in params.items() if path not in beside}
    stays_fresh = _matching_paths("init.fresh", options.fresh, base)
    may_be_left = _matching_paths("init.leave", options.leave, source)
    names = _renamed(options.rename, source)

    loaded = {path: names[path] for path in base if path in names and path not in stays_fresh}
    missing = [path for path in base if path not in names and path not in stays_fresh]
    left = [name for path, name in names.items() if path not in loaded]
    unused = [name for path, name in names.items() if path not in base and name not in may_be_left]
    different = [
        f"{path} {tuple(base[path].shape)} from {tuple(source[name].shape)}"
        for path, name in loaded.items()
        if not _shapes_match(base[path].shape, source[name].shape, resizable.get(path))
    ]
    problems = [
        f"{len(paths)} {what}: {', '.join(paths[:5])}{', …' if len(paths) > 5 else ''}"
        for what, paths in (
            ("of this model are missing there (allow with --config.init.fresh)", missing),
            ("have a different shape there (skip them with --config.init.fresh)", different),
            ("there do not exist here (allow with --config.init.leave)", unused),
        )
        if paths
    ]
    if problems:
        raise UserError(
            f"parameters of --config.init.from={options['from']}: {'; '.join(problems)}; "
            "--config.init.rename maps names"
        )
    made = {path for path in params if path.startswith(f"{SCALES}/") or is_frozen(path)}
    fresh = [path for path in params if path not in loaded and path not in made]
    return ParamMapping(loaded, fresh, left)


def _shapes_match(one: Sequence[int], two: Sequence[int], axis: int | None) -> bool:
    """Return whether two shapes are equal except for the size of one axis."""
    same_rank = len(one) == len(two)
    return same_rank and all(
        a == b or i == axis for i, (a, b) in enumerate(zip(one, two, strict=True))
    )


def _matching_paths(key: str, text: str, leaves: Mapping[str, Any]) -> set[str]:
    return {path for path, group in matching(key, text, leaves).items() if group.any()}


def _renamed(text: str, source: Mapping[str, Any]) -> dict[str, str]:
    """Return the source name of each parameter after renaming."""
    new = {name: name for name in source}
    for pattern, replacement in rename_rules(text):
        after = {name: pattern.sub(replacement, path) for name, path in new.items()}
        if after == new:
            raise UserError(
                f"--config.init.rename: {f'{pattern.pattern}=>{replacement}'!r} changes no name"
            )
        new = after
    names = {path: name for name, path in new.items()}
    if len(names) < len(new):
        twice = next(path for name, path in new.items() if names[path] != name)
        raise UserError(f"--config.init.rename gives two parameters the name {twice}")
    return names


def _check_tokenizer(
    experiment: Experiment, plan: ParamMapping, source: SavedCheckpoint, digest: str
) -> None:
    source_digest = source.metadata["fingerprint"]["tokenizer"]
    infos = experiment.param_infos
    tables = [path for path in plan.loaded if path in infos and "vocab" in infos[path].axes]
    # Imported models may have no tokenizer.
    if tables and source_digest and source_digest != digest:
        raise UserError(
            "the tokenizer differs from that of "
            f"--config.init.from={experiment.config.init['from']}, so "
            f"{', '.join(tables)} would mix up tokens: use its tokenizer, or --config.init.fresh"
        )


def _describe(source: str, steps: Sequence[int], plan: ParamMapping, n_params: int) -> str:
    where = f"{'mean of ' if len(steps) > 1 else ''}step {', '.join(map(str, steps))}"
    loaded = [
        path if path == name else f"{path} (from {name})" for path, name in plan.loaded.items()
    ]
    lines = [f"parameters of {source}, {where}: {n_params:,} parameters"]
    for what, paths in (("loaded", loaded), ("fresh", plan.fresh), ("left", plan.left)):
        lines.append(f"  {what} {len(paths)}: {', '.join(paths) or 'none'}")
    return "\n".join(lines)
