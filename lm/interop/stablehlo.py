"""Export of a run as StableHLO programs, which run in any process with JAX but without `lm`.

A program is a pure function of the weights and input arrays, lowered by `jax.export` for the named
platforms and one device. A generator has two: `prefill` reads prompts, or the sources of an
encoder–decoder, and `decode` adds one token to each row. Encoders have `encode` and `logits`;
classifiers, taggers and question answerers have `predict`. lm/interop/run_exported.py, which is
written next to them, runs them.

Shape letters: B batch, L length, D model, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lm.data.special_tokens import special_tokens, target_start
from lm.data.tokenizer import Template
from lm.decoding.controls import Controls
from lm.decoding.prompts import (
    context_length,
    first_inputs,
    is_encoder_decoder,
    require_text_input,
)
from lm.decoding.sampling import decode_last
from lm.decoding.weights import prepare
from lm.errors import UserError, missing_package, nearest
from lm.experiment import Experiment
from lm.interop import run_exported
from lm.interop.tokenizer_files import write_tokenizer
from lm.models.task_layers import mean_of_row
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Params, as_variables, flat
from lm.runs.checkpoints import Log
from lm.runs.saved_params import require_empty, restore_run

PLATFORMS = ("cpu", "tpu", "cuda", "rocm")
_SCORERS = ("classification", "reward")
_PREDICTORS = ("token_classification", "span_qa")
Program = tuple[Callable[..., Any], tuple[str, ...]]  # programs, and the names of their inputs
_TEXT = ("tokens", "segments", "types")


@dataclass(frozen=True)
class Sizes:
    """Array sizes of exported programs.

    Attributes:
        platforms: platforms to lower for.
        batch: rows, B; None: any number.
        length: length of prompts, sources and texts, L; None: any.
        context: maximum length of a prompt with its continuation, or of a target; None: the number
            of positions of the model, or else `data.sequence_length`.
    """

    platforms: tuple[str, ...] = PLATFORMS[:3]
    batch: int | None = None
    length: int | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        for name in self.platforms:
            if name not in PLATFORMS:
                raise UserError(
                    f"--platforms: unknown platform {name!r}{nearest(name, PLATFORMS)}; "
                    f"known: {', '.join(PLATFORMS)}"
                )

    def inputs(self) -> dict[str, Any]:
        """Return the shapes of the inputs by name."""
        batch, length = jax.export.symbolic_shape("batch, length")
        B, L = self.batch or batch, self.length or length
        text = jax.ShapeDtypeStruct((B, L), jnp.int32)
        return dict.fromkeys(_TEXT, text) | {"token": jax.ShapeDtypeStruct((B,), jnp.int32)}


def export_programs(
    workdir: Path,
    to: Path,
    sizes: Sizes,
    overrides: Mapping[str, str],
    average: int,
    best: bool,
    log: Log,
) -> None:
    """Write a run as StableHLO programs, weights, a manifest and a script that runs them.

    Args:
        workdir: folder of the run.
        to: output folder, empty or not yet existing.
        sizes: platforms and shapes.
        overrides: configuration keys, such as `decode.weights`.
        average: number of newest checkpoints whose parameters are averaged.
        best: export the checkpoint that `--config.eval.best` kept.
        log: receives the lines for the user.

    Raises:
        UserError: `to` is not empty, or this kind of run has no programs.
    """
    require_empty(to)
    if find_spec("flatbuffers") is None:
        raise missing_package("lm export --format stablehlo", "flatbuffers", "stablehlo")
    experiment, params, step = restore_run(
        workdir, overrides, log, average=average, best=best, any_batch=True
    )
    experiment, params = prepare(experiment, params)
    programs = _programs(experiment, params, sizes)
    exported = _lower(programs, params, sizes, _longest(experiment, programs, sizes))
    to.mkdir(parents=True, exist_ok=True)
    weights = {name: np.asarray(x) for name, x in _by_name(params).items()}
    save_file(weights, to / run_exported.WEIGHTS)
    tokenizer = experiment.tokenizer
    about = _manifest(experiment, sizes, step, exported)
    about["weights"] = {name: [str(x.dtype), *x.shape] for name, x in weights.items()}
    about["programs"] = {}
    for name, program in exported.items():
        (to / f"{name}{run_exported.SUFFIX}").write_bytes(program.serialize())
        about["programs"][name] = _signature(programs[name][1], program)
    (to / run_exported.MANIFEST).write_text(json.dumps(about, indent=1) + "\n")
    shutil.copyfile(run_exported.__file__, to / "run.py")
    if tokenizer and not write_tokenizer(tokenizer, to, experiment.config.model.family, None):
        log(f"a {tokenizer.kind} tokenizer has no equivalent there and was left out")
    log(f"{to}: {', '.join(programs)} of step {step} for {', '.join(sizes.platforms)}")


def _programs(experiment: Experiment, params: Params, sizes: Sizes) -> dict[str, Program]:
    """Return the programs of a prepared experiment."""
    model, objective = experiment.model, experiment.config.objective.name
    if isinstance(config := model.config, TransformerConfig):  # type: ignore[attr-defined]
        model = model.clone(config=replace(config, attention="xla"))
    modules = {path.partition("/")[0] for path in flat(params)}

    def hidden(params: Params, *text: jax.Array) -> tuple[nn.Module, jax.Array]:
        bound: Any = model.bind(as_variables(params))
        tokens_BL, segments_BL, types_BL = text
        return bound, bound.hidden(tokens_BL, None, segments_BL, types_BL)

    def scores(params: Params, *text: jax.Array) -> dict[str, jax.Array]:
        bound, x_BLD = hidden(params, *text)
        return {"scores": bound.classify(bound.pooled(x_BLD, text[1]))}  # type: ignore[operator]

    def predict(params: Params, *text: jax.Array) -> dict[str, jax.Array]:
        batch = dict(zip(("inputs", "segment_ids", "token_types"), text, strict=True))
        bound: Any = model.bind(as_variables(params))
        return {"predictions": experiment.objective.predict(bound, batch)}

    def encode(params: Params, *text: jax.Array) -> dict[str, jax.Array]:
        _, x_BLD = hidden(params, *text)
        mean_BD = mean_of_row(x_BLD, text[1])
        return {"hidden": x_BLD.astype(jnp.float32), "mean": mean_BD.astype(jnp.float32)}

    def logits(params: Params, *text: jax.Array) -> dict[str, jax.Array]:
        bound, x_BLD = hidden(params, *text)
        return {"logits": bound.logits(x_BLD)}  # type: ignore[operator]

    found: dict[str, Program] = {}
    if experiment.config.model.family == "encoder":
        found["encode"] = encode, _TEXT
        if "transform" in modules:
            found["logits"] = logits, _TEXT
    if objective in _SCORERS:
        return found | {"predict": (scores, _TEXT)}
    if objective in _PREDICTORS:
        return found | {"predict": (predict, _TEXT)}
    if hasattr(model, "decode"):
        return _generator(experiment, model, sizes)
    if not found:
        raise UserError(
            f"a {experiment.config.model.family} trained by {objective} neither generates nor "
            "encodes texts: there is no program to export"
        )
    return found


def _generator(experiment: Experiment, model: nn.Module, sizes: Sizes) -> dict[str, Program]:
    """Return the programs `prefill` and `decode`.

    The cache is passed between them as a list of arrays, the first of which has the number of
    tokens in each row.
    """
    require_text_input(model, "export of programs")
    context = _context(experiment, sizes)
    start = target_start(experiment.tokenizer, experiment.config.data.target_prefix)
    treedef: Any = None

    def after(lengths_B: jax.Array, logits_BLV: jax.Array, cache: Any) -> dict[str, Any]:
        nonlocal treedef
        leaves, treedef = jax.tree.flatten(cache)
        return {"logits": logits_BLV[:, -1].astype(jnp.float32), "cache": [lengths_B, *leaves]}

    def step(params: Params, tokens_B: jax.Array, lengths_B: jax.Array, cache: Any) -> dict:
        tokens_B1 = tokens_B[:, None]
        inputs = tokens_B1, lengths_B[:, None], jnp.ones_like(tokens_B1), cache
        return after(lengths_B + 1, *decode_last(model, params, *inputs))

    def prefill(params: Params, tokens_BL: jax.Array, segments_BL: jax.Array) -> dict:
        if is_encoder_decoder(model):
            inputs = tokens_BL, segments_BL, context
            cache: Any = model.apply(as_variables(params), *inputs, method="start")
            first = first_inputs(start, tokens_BL.shape[0])
            return after(first[2].sum(-1), *decode_last(model, params, *first, cache))
        cache = model.apply({}, tokens_BL.shape[0], context, method="empty_cache")
        positions_BL = jnp.maximum(segments_BL.cumsum(-1) - 1, 0)
        prefix = (segments_BL,) if experiment.objective.has_prefix else ()
        inputs_of_prompt = tokens_BL, positions_BL, segments_BL, cache, *prefix
        return after(segments_BL.sum(-1), *decode_last(model, params, *inputs_of_prompt))

    def decode(params: Params, tokens_B: jax.Array, cache: list[jax.Array]) -> dict:
        lengths_B, *leaves = cache
        return step(params, tokens_B, lengths_B, jax.tree.unflatten(treedef, leaves))

    return {"prefill": (prefill, _TEXT[:2]), "decode": (decode, ("token", "cache"))}


def _context(experiment: Experiment, sizes: Sizes) -> int:
    """Return the length of the cache; raise UserError if the model has fewer positions."""
    most = context_length(experiment.model)
    context = sizes.context or most or experiment.config.data.sequence_length
    if most and context > most:
        raise UserError(f"--context {context}: the model has positions for {most} tokens")
    if (sizes.length or 0) > context and not is_encoder_decoder(experiment.model):
        raise UserError(f"--length {sizes.length} is more than the context of {context} tokens")
    return context


def _longest(experiment: Experiment, programs: Iterable[str], sizes: Sizes) -> int | None:
    """Return the maximum number of tokens of a prompt, source or text; None: any."""
    if "decode" in programs and not is_encoder_decoder(experiment.model):
        return _context(experiment, sizes)
    return context_length(experiment.model)


def _by_name(params: Params) -> dict[str, jax.Array]:
    """Return the arrays of prepared parameters by path, int8 kernels as separate parts."""
    found = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in found}


def _lower(
    programs: Mapping[str, Program], params: Params, sizes: Sizes, longest: int | None
) -> dict[str, jax.export.Exported]:
    """Lower programs, which take the weights as a dict by name; `decode` takes `prefill`'s cache.

    Args:
        programs: programs by name.
        params: prepared parameters.
        sizes: platforms and shapes.
        longest: maximum number of tokens of a prompt; None: any.

    Raises:
        UserError: JAX cannot lower a program without fixed sizes.
    """
    treedef, weights = jax.tree.structure(params), _by_name(params)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    inputs, found = sizes.inputs(), {}
    for name, (function, names) in programs.items():

        def by_name(weights: Mapping[str, Any], *arrays: Any, function: Any = function) -> Any:
            return function(jax.tree.unflatten(treedef, [weights[n] for n in shapes]), *arrays)

        lower = jax.export.export(jax.jit(by_name), platforms=list(sizes.platforms))
        try:
            found[name] = lower(shapes, *_scoped([inputs[n] for n in names], longest))
        except jax.core.InconclusiveDimensionOperation as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"the program {name} of this model needs fixed sizes ({reason}): give --batch and "
                "--length"
            ) from error
        outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in found[name].out_avals]
        inputs |= jax.tree.unflatten(found[name].out_tree, outputs)
    return found


def _scoped(inputs: Sequence[Any], longest: int | None) -> Any:
    """Limit the `length` of a program's inputs, if it is symbolic."""
    sizes = {str(n) for x in jax.tree.leaves(inputs) for n in x.shape if not isinstance(n, int)}
    limits = [f"length <= {longest}"] if longest and any("length" in n for n in sizes) else []
    scope = jax.export.SymbolicScope(limits)

    def scoped(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = jax.export.symbolic_shape(", ".join(map(str, x.shape)), scope=scope)
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.tree.map(scoped, inputs)


def _manifest(
    experiment: Experiment, sizes: Sizes, step: int, exported: Mapping[str, jax.export.Exported]
) -> dict[str, Any]:
    """Return the information for processes without `lm`."""
    tokenizer, config = experiment.tokenizer, experiment.config
    about: dict[str, Any] = {
        "format": run_exported.FORMAT,
        "jax": jax.__version__,
        "step": step,
        "family": config.model.family,
        "objective": config.objective.name,
        "platforms": list(sizes.platforms),
        "labels": list(experiment.objective.class_names),
    }
    if "decode" in exported:
        about["context"] = _context(experiment, sizes)
    if tokenizer is not None:
        special = special_tokens(tokenizer)
        is_source = is_encoder_decoder(experiment.model)
        around = special.around_source if is_source else tokenizer.template
        if config.model.family == "encoder":
            around = Template((special.cls,), (special.sep,))
        after = around.after if is_source or config.model.family == "encoder" else ()
        about |= {
            "before": [int(i) for i in around.before],
            "after": [int(i) for i in after],
            "end_ids": list(Controls.from_config(config, tokenizer).end_ids),
        }
    return about


def _signature(names: Sequence[str], program: jax.export.Exported) -> dict[str, Any]:
    """Return the inputs besides the weights, and the outputs, each as [name, dtype, *shape].

    Symbolic sizes are given by name; a cache has an entry for each of its arrays.
    """

    def rows(tree: Any) -> list[list[Any]]:
        found = jax.tree_util.tree_leaves_with_path(tree)
        return [
            [
                jax.tree_util.keystr(path, simple=True, separator="/"),
                str(x.dtype),
                *(n if isinstance(n, int) else str(n) for n in x.shape),
            ]
            for path, x in found
        ]

    (_, *arrays), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    outputs = jax.tree.unflatten(program.out_tree, program.out_avals)
    inputs = [row for name, x in zip(names, arrays, strict=True) for row in rows({name: x})]
    return {"inputs": inputs, "outputs": rows(outputs)}
