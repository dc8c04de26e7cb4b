"""`lm import` and `lm export`: a run from a Hugging Face folder, and such a folder from a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from lm import config as configs
from lm.config.schema import SCHEMA
from lm.data.tokenizers.choice import Tokenizer, choose_tokenizer
from lm.errors import UserError
from lm.experiment import resolve
from lm.interop.huggingface import save
from lm.interop.model_folder import Checkpoint, open_checkpoint
from lm.interop.tokenizer_files import read_tokenizer, write_tokenizer
from lm.models.families import make_model
from lm.objectives.registry import label_names
from lm.objectives.special_tokens import special_tokens
from lm.optim.parameter_groups import nested
from lm.parallel.hosts import is_lead
from lm.parallel.mesh import axis_sizes, make_mesh
from lm.runs.checkpoints import BEST_FOLDER, Checkpoints, Log
from lm.runs.saved_params import mean_params, saved_checkpoints
from lm.runs.workdir import MERGED_OVERRIDES, RUN_FILE, load_config, load_tokenizer
from lm.storage import origin, write_atomically
from lm.train_step import TrainState

_LONGEST = 1024  # tokens of an example, unless data.sequence_length says otherwise


def import_run(source: Path, workdir: Path, overrides: Mapping[str, str], log: Log) -> None:
    """Write the model at `source` to `workdir` as the checkpoint of step 0 of a run.

    UserError if `workdir` holds something already, or for what `source` lacks.
    """
    _check_empty(workdir)
    found = open_checkpoint(source)
    config = run_config(found)
    for path, text in overrides.items():
        configs.set_value(config, path, configs.parse_value(path, text))
    if "data.tokenizer" in overrides:
        tokenizer: Tokenizer | None = choose_tokenizer(config.data, [])
    else:
        tokenizer = read_tokenizer(source)
        if tokenizer is not None:
            config.data.tokenizer = f"run:{origin(workdir)}"
    configs.validate(config)
    sizes = axis_sizes(config.parallel.preset, config.parallel.mesh, len(jax.devices()))
    params = found.params(make_mesh(sizes, jax.devices()))
    metadata = {
        "config": json.loads(config.to_json()),
        "fingerprint": {"tokenizer": tokenizer.digest if tokenizer else ""},
    }
    if is_lead():
        workdir.mkdir(parents=True, exist_ok=True)
        if tokenizer:
            tokenizer.save(workdir / "tokenizer")
        write_atomically(workdir / RUN_FILE, json.dumps(metadata, indent=1))
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint, metadata)
    checkpoints.save(0, TrainState(jnp.zeros((), jnp.int32), params, {}, {}))
    checkpoints.close()
    log(_describe(found, tokenizer, workdir))


def run_config(found: Checkpoint) -> ConfigDict:
    """The configuration of a run that this model could have come from."""
    config = configs.default()
    config.model.family = found.family.model
    for name, value in asdict(found.config).items():
        if f"model.{name}" in SCHEMA and name not in ("dtype", "attention", "n_classes"):
            config.model[name] = value
    labels = found.about.get("id2label") or {}
    if found.family.model == "encoder_decoder":
        config.objective.name = "span_corruption"
    elif found.family.model == "encoder":
        config.objective.name = "masked"
        config.objective.next_sentence = "next_sentence" in found.heads
        if "spans" in found.heads:
            config.objective.name = "span_qa"
        if "classes" in found.heads:
            config.objective.name = "classification"
            names = [labels.get(str(i), f"LABEL_{i}") for i in range(found.config.n_classes)]
            config.data.labels = ",".join(name.replace(",", " ") for name in names)
    config.data.sequence_length = min(found.config.max_length, _LONGEST)
    return config


def export_run(workdir: Path, to: Path, average: int, best: bool, dtype: str, log: Log) -> None:
    """Write the run in `workdir` to the folder `to` as a model that `transformers` loads.

    Its newest parameters, or the mean of the last `average` checkpoints, or with `best` those that
    config.eval.best chose; low-rank updates are merged. UserError if `to` holds something already,
    or no architecture of theirs computes what the model does.
    """
    _check_empty(to)
    config = resolve(load_config(workdir, MERGED_OVERRIDES), "cpu")
    checkpoints = saved_checkpoints(workdir / BEST_FOLDER if best else workdir, log)
    one = NamedSharding(Mesh(jax.devices()[:1], "x"), PartitionSpec())
    shardings = dict.fromkeys(checkpoints[0].shapes, one)
    params, steps = mean_params(checkpoints, average, shardings, log)
    tokenizer = load_tokenizer(workdir) if (workdir / "tokenizer").is_dir() else None
    about: dict[str, Any] = {}
    if tokenizer:
        about |= _special_ids(config, tokenizer)
    if config.objective.name == "classification":
        names = label_names(config.data.labels)
        about["id2label"] = {str(i): name for i, name in enumerate(names)}
        about["label2id"] = {name: i for i, name in enumerate(names)}
    name = save(make_model(config, "xla", "gather"), nested(params), to, dtype=dtype, about=about)
    if tokenizer and not write_tokenizer(tokenizer, to):
        log(f"a {tokenizer.kind} tokenizer has no equivalent there and was left out")
    log(f"{to}: {name} of step {', '.join(map(str, steps))}, in {dtype}")


def _special_ids(config: ConfigDict, tokenizer: Tokenizer) -> dict[str, Any]:
    special = special_tokens(tokenizer)
    known = config.model.vocab_size
    ids = {"bos": tokenizer.bos_id, "eos": special.eos, "pad": special.pad}
    if config.model.family == "encoder_decoder":
        ids["decoder_start"] = special.bos
    if config.model.position_offset:
        del ids["pad"]  # theirs counts positions from it
    return {f"{role}_token_id": i for role, i in ids.items() if i is not None and i < known}


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; name another")


def _describe(found: Checkpoint, tokenizer: Tokenizer | None, workdir: Path) -> str:
    n = sum(prod(parameter.shape) for parameter in found.parameters.values())
    run = origin(workdir)
    lines = [f"{run}: {found.family.model_type} of {n:,} parameters"]
    rows = found.config.vocab_size
    if tokenizer is None:
        lines.append(
            "no tokenizer came with it: name one by --config.data.tokenizer to generate or evaluate"
        )
    elif tokenizer.vocab_size > rows:
        lines.append(f"its tokenizer has {tokenizer.vocab_size} ids and its table only {rows} rows")
    lines.append(
        f"train it on by: lm train --config {run / RUN_FILE} --config.init.from={run} "
        "--workdir NEW --config.data.source=…"
    )
    return "\n".join(lines)
