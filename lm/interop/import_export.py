"""Import and export: a run from a Hugging Face folder, and a folder from a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from lm import config as configs
from lm.config.registries import CONVERSATIONS, OBJECTIVES, SCHEMA
from lm.config.registry import listed, listing
from lm.data.chat.extended_tokenizer import ExtendedTokenizer
from lm.data.special_tokens import special_tokens
from lm.data.tokenizer import Tokenizer, check_vocabulary, make_tokenizer
from lm.data.tokenizers.folder import CONFIG, FolderTokenizer
from lm.errors import UserError, missing_package
from lm.experiment import record_columns, resolve
from lm.interop.generation_settings import banned_tokens, forced_tokens
from lm.interop.huggingface import class_labels, save
from lm.interop.model_folder import (
    ModelFolder,
    is_without_output,
    open_model_folder,
    some_tensors,
)
from lm.interop.mup import without_mup
from lm.interop.tokenizer_files import (
    model_settings,
    read_tokenizer,
    write_tokenizer,
    write_turn_ends,
)
from lm.models.ahead_modules import without_ahead
from lm.models.transformer_config import make_model
from lm.models.variables import Params, nested
from lm.parallel.mesh import axis_sizes, is_primary_host, make_mesh
from lm.qk_clip import is_largest_logits
from lm.runs.checkpoints import BEST_FOLDER, Checkpoints, Log
from lm.runs.saved_params import (
    TRAINING_ONLY,
    load_tokenizer,
    mean_params,
    require_empty,
    saved_checkpoints,
)
from lm.runs.workdir import MERGED_OVERRIDES, RUN_FILE, load_run_config, read_run_metadata
from lm.storage import storage_path, write_atomically
from lm.train_step import TrainState

# Values of `problem_type` in config.json.
_SINGLE_LABEL, _MULTI_LABEL = "single_label_classification", "multi_label_classification"
_REGRESSION = "regression"
_LONGEST = 1024  # tokens of an example, unless data.sequence_length is given


def import_run(source: Path, workdir: Path, overrides: Mapping[str, str], log: Log) -> None:
    """Write a model folder as a run with one checkpoint at step 0.

    Args:
        source: folder of `transformers`, or a .bin file of llama2.c.
        workdir: folder of the new run, empty or not yet existing.
        overrides: configuration keys of the run, `{path: text}`.
        log: receives the lines for the user.

    Raises:
        UserError: `workdir` is not empty, or `source` cannot be read.
    """
    require_empty(workdir)
    found = open_model_folder(source)
    try:
        config = run_config(found)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    for path, text in overrides.items():
        configs.set_value(config, path, configs.parse_value(path, text))
    if "data.tokenizer" in overrides:
        tokenizer: Tokenizer | None = make_tokenizer(config.data, [])
    else:
        tokenizer = read_tokenizer(source)
        if tokenizer is not None:
            config.data.tokenizer = f"run:{storage_path(workdir)}"
            if config.objective.name == "transcription" and "data.target_prefix" not in overrides:
                config.data.target_prefix = listing(forced_tokens(tokenizer))
            if "decode.banned_tokens" not in overrides:
                config.decode.banned_tokens = banned_tokens(tokenizer, found.config.vocab_size)
    configs.validate(config)
    if tokenizer is not None:
        check_vocabulary(tokenizer, found.config.vocab_size)
    sizes = axis_sizes(config.parallel.preset, config.parallel.mesh, len(jax.devices()))
    mesh = make_mesh(sizes, jax.devices())
    params = found.params(mesh)
    step = jax.device_put(np.int32(0), NamedSharding(mesh, PartitionSpec()))
    metadata = {
        "config": json.loads(config.to_json()),
        "fingerprint": {"tokenizer": tokenizer.digest if tokenizer else ""},
    }
    if is_primary_host():
        workdir.mkdir(parents=True, exist_ok=True)
        if tokenizer:
            tokenizer.save(workdir / "tokenizer")
        ids = {name: i for name, i in found.about.items() if name.endswith("_token_id")}
        stated = metadata | {"model_type": found.family.model_type, "special_ids": ids}
        write_atomically(workdir / RUN_FILE, json.dumps(stated, indent=1))
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint, metadata)
    checkpoints.save(0, TrainState(step, {}, {}, {}).with_inference_params(params))
    checkpoints.close()
    log(_describe(found, config, tokenizer, workdir))


def run_config(found: ModelFolder) -> ConfigDict:
    """Return the configuration of a run that could have trained this model.

    Raises:
        UserError: no such run has the classes or the kind of problem that config.json names.
    """
    config = configs.default()
    config.model.family = found.family.model
    values = asdict(found.config)
    for name, value in (values | (values["mixer_options"] or {})).items():
        if f"model.{name}" in SCHEMA and name not in ("dtype", "attention", "n_classes"):
            config.model[name] = value
    if found.family.model == "encoder_decoder":
        config.objective.name = found.family.objective or "span_corruption"
    elif found.family.model == "encoder":
        config.objective.name = "masked"
        config.objective.next_sentence = "next_sentence" in found.heads
        if "replaced" in found.heads:
            config.objective.name = "replaced_tokens"
    if "spans" in found.heads:
        config.objective.name = "span_qa"
    if "classes" in found.heads or "tags" in found.heads:
        is_alone = found.family.model == "encoder" and found.heads == {"classes"}
        of_tokens = is_alone or "tags" in found.heads
        config.objective.name = "token_classification" if of_tokens else "classification"
        kind = _SINGLE_LABEL if of_tokens else _problem_type(found)
        n = config.model.n_classes = found.config.n_classes
        config.data.multi_label = kind == _MULTI_LABEL or (kind == _REGRESSION and n > 1)
        if kind != _REGRESSION:
            config.data.labels = listing(_class_names(found))
    config.data.sequence_length = min(found.config.max_length, _LONGEST)
    if found.config.n_mels:
        config.data.target_length = config.data.sequence_length
        config.data.sequence_length = found.config.max_source_length
        config.data.n_mels = found.config.n_mels
    return config


def _problem_type(found: ModelFolder) -> str:
    """Return `problem_type` of config.json; UserError if it does not fit the number of outputs."""
    n = found.config.n_classes
    known = (_SINGLE_LABEL, _MULTI_LABEL, _REGRESSION) if n > 1 else (_REGRESSION, _MULTI_LABEL)
    kind = found.about.get("problem_type") or known[0]
    if kind not in known:
        raise UserError(
            f"config.json: problem_type={kind} is not supported with {n} outputs, "
            f"only {' or '.join(known)}"
        )
    return kind


def _class_names(found: ModelFolder) -> list[str]:
    """Return the names in `id2label` of config.json; UserError if they are invalid labels."""
    n, stated = found.config.n_classes, found.about.get("id2label")
    if stated is None or stated == {}:
        return list(class_labels(n)["id2label"].values())
    if not isinstance(stated, dict) or stated.keys() != {str(i) for i in range(n)}:
        raise UserError(
            f"config.json: id2label is not an object with a name for each of 0 to {n - 1}"
        )
    names = [stated[str(i)] for i in range(n)]
    for i, name in enumerate(names):
        if not isinstance(name, str):
            problem = "is not a string"
        elif listed(listing([name])) != [name]:
            problem = "has white space at an end" if name.strip() else "is empty"
        elif name in names[:i]:
            problem = "is listed twice"
        else:
            continue
        raise UserError(f"config.json: id2label: the name {name!r} of class {i} {problem}")
    return names


@dataclass(frozen=True)
class ReadRun:
    """Run that was read for export, on one device.

    Attributes:
        config: resolved configuration.
        model: its model, without fused kernels.
        params: parameters with LoRA updates and muP's multipliers merged.
        tokenizer: its tokenizer, or None.
        steps: steps of the checkpoints whose parameters were averaged.
        model_type: architecture of `transformers` from which the run was imported; None otherwise.
        special_ids: ids in the config.json from which it was imported.
    """

    config: ConfigDict
    model: nn.Module
    params: Params
    tokenizer: Tokenizer | None
    steps: str
    model_type: str | None
    special_ids: Mapping[str, Any]

    @property
    def plain_tokenizer(self) -> Tokenizer | None:
        """Tokenizer without added tokens."""
        found = self.tokenizer
        return found.base if isinstance(found, ExtendedTokenizer) else found


def read_to_export(workdir: Path, average: int, best: bool, log: Log) -> ReadRun:
    """Read a run for export; for arguments see `export_run`."""
    config = resolve(load_run_config(workdir, MERGED_OVERRIDES), "cpu")
    checkpoints = saved_checkpoints(workdir / BEST_FOLDER if best else workdir, log)
    one = NamedSharding(Mesh(jax.devices()[:1], "x"), PartitionSpec())
    shardings = dict.fromkeys(checkpoints[0].shapes, one)
    params, steps = mean_params(checkpoints, average, shardings, log)
    tokenizer = load_tokenizer(workdir) if (workdir / "tokenizer").is_dir() else None
    tree = nested({path: x for path, x in params.items() if not is_largest_logits(path)})
    for name in sorted({*TRAINING_ONLY} & tree.keys()):
        log(f"{name}: left out; used only in training")
    config, plain = without_mup(config, without_ahead(tree))
    model = make_model(config, "xla", "gather")
    stated = read_run_metadata(workdir) or {}
    kind = stated.get("model_type") or _stated_type(tokenizer)
    origin = kind, stated.get("special_ids") or {}
    return ReadRun(config, model, plain, tokenizer, ", ".join(map(str, steps)), *origin)


def _stated_type(tokenizer: Tokenizer | None) -> str | None:
    """Return the architecture of the folder that a tokenizer came from."""
    plain = tokenizer.base if isinstance(tokenizer, ExtendedTokenizer) else tokenizer
    stated = plain.stated(CONFIG) if isinstance(plain, FolderTokenizer) else None
    return (stated or {}).get("model_type")


def export_run(
    workdir: Path, to: Path, average: int, best: bool, dtype: str, log: Log, quantize: str = ""
) -> None:
    """Write a run as a folder that `transformers` loads, tokenizer included.

    LoRA updates are merged into the kernels.

    Args:
        workdir: folder of the run.
        to: output folder, empty or not yet existing.
        average: number of newest checkpoints whose parameters are averaged.
        best: export the checkpoint that `--config.eval.best` kept.
        dtype: float32, bfloat16 or float16.
        log: receives the lines for the user.
        quantize: int8 or int4 for the layers' matrices; "" for none.

    Raises:
        UserError: `to` is not empty, or no architecture of `transformers` computes the same
            function as the model.
    """
    require_empty(to)
    run = read_to_export(workdir, average, best, log)
    config, tokenizer = run.config, run.tokenizer
    if tokenizer and find_spec("tokenizers") is None:
        raise missing_package("lm export", "tokenizers", "hf")
    about: dict[str, Any] = {}
    plain = run.plain_tokenizer
    if isinstance(plain, FolderTokenizer):
        about |= model_settings(plain)
    elif tokenizer:
        about |= _special_ids(config, tokenizer)
    else:
        about |= run.special_ids
    if "classifier" in run.params:
        labels = OBJECTIVES[config.objective.name].from_config(config, tokenizer).class_names
        about |= class_labels(config.model.n_classes, labels)
        if config.objective.name == "classification":
            named = _MULTI_LABEL if config.data.multi_label else _SINGLE_LABEL
            about["problem_type"] = named if labels else _REGRESSION
    options: dict[str, Any] = {"about": about, "model_type": run.model_type, "quantize": quantize}
    options["of_tokens"] = config.objective.name == "token_classification"
    class_name = save(run.model, run.params, to, dtype=dtype, **options)
    is_bounded = config.model.positions == "learned"
    length = config.model.max_length if is_bounded else None
    if tokenizer and not write_tokenizer(tokenizer, to, config.model.family, length):
        kind = plain.kind if plain else ""
        log(f"a {kind} tokenizer has no equivalent there and was left out")
    elif tokenizer and (
        tokenizer is not plain or CONVERSATIONS.intersection(record_columns(config))
    ):
        write_turn_ends(tokenizer, to)
    log(f"{to}: {class_name} of step {run.steps}, in {quantize or dtype}")


def _special_ids(config: ConfigDict, tokenizer: Tokenizer) -> dict[str, Any]:
    special = special_tokens(tokenizer)
    known = config.model.vocab_size
    ids = {"bos": tokenizer.bos_id, "eos": special.eos, "pad": special.pad}
    if config.model.family == "encoder_decoder":
        ids["decoder_start"] = special.bos
    if config.model.pooling == "shifted" and config.model.start_id < 0:
        ids["eos"] = ids["decoder_start"] = special.sep
    if config.model.position_offset:
        del ids["pad"]  # RobertaModel counts positions from it
    return {f"{role}_token_id": i for role, i in ids.items() if i is not None and i < known}


def _describe(
    found: ModelFolder, config: ConfigDict, tokenizer: Tokenizer | None, workdir: Path
) -> str:
    n = sum(prod(parameter.shape) for parameter in found.parameters.values())
    run = storage_path(workdir)
    lines = [f"{run}: {found.family.model_type} of {n:,} parameters"]
    rows = found.config.vocab_size
    if found.unused:
        lines.append(f"left out: {some_tensors(found.unused)}, which its class does not use")
    if is_without_output(found.family, found.about):
        lines.append("its class has no output layer: logits are products with the token embeddings")
    if found.config.n_mels and tokenizer:
        names = "".join(listed(config.data.target_prefix))
        lines.append(
            f"targets begin with {names}"
            if names
            else "its files name no language and task: set --config.data.target_prefix, such as "
            "'<|en|>,<|transcribe|>,<|notimestamps|>'"
        )
    if banned := listed(config.decode.banned_tokens):
        lines.append(f"never generated: {len(banned)} tokens (--config.decode.banned_tokens)")
    if tokenizer is None:
        lines.append(
            "no tokenizer came with it: name one by --config.data.tokenizer to generate or evaluate"
        )
    elif tokenizer.vocab_size > rows:
        lines.append(f"special tokens of its tokenizer have no row: ids {rows} and up")
    pad = found.about.get("pad_token_id")
    if isinstance(pad, int) and pad >= rows:
        lines.append(f"pad_token_id={pad} of its config.json has no row: the last is {rows - 1}")
    lines.append(
        f"train it on by: lm train --config {run / RUN_FILE} --config.init.from={run} "
        "--workdir NEW --config.data.source=…"
    )
    return "\n".join(lines)
