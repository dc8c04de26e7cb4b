"""Parameters of saved runs: read from checkpoints, verified, sharded, merged and averaged.

Reading verifies checksums, shards parameters over any mesh, merges LoRA updates
(`lm/models/lora.py`) and averages checkpoints; the run itself is never modified. Parameters are
dictionaries by path.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from lm.data.tokenizer import Tokenizer, load_saved_tokenizer
from lm.errors import UserError
from lm.experiment import Experiment, build, build_untraced
from lm.models.ahead_modules import AHEAD
from lm.models.frozen import is_frozen, reference_path
from lm.models.lora import kernel_of, merge_lora
from lm.models.variables import MODEL_STATE, Params, flat, nested, with_state
from lm.parallel.mesh import AXES, is_primary_host, on_all_hosts
from lm.runs.checkpoints import BEST_FOLDER, Checkpoints, Log, checksums, one_line, run_metadata
from lm.runs.workdir import MERGED_OVERRIDES, RUN_FILE, load_run_config, read_run_metadata
from lm.storage import AnyPath, is_committed, is_step, storage_path, write_atomically

FlatParams = dict[str, jax.Array]

TRAINING_ONLY = (AHEAD, "generator")  # modules
# Overrides that restore a model without its frozen companions.
WITHOUT_FROZEN = {
    "objective.reference": "none",
    "objective.teacher": "",
    "objective.teacher_logits": "",
}


@dataclass(frozen=True)
class SavedCheckpoint:
    """Checkpoint on disk.

    Attributes:
        folder: checkpoint folder.
        metadata: content of its metadata file (lm/runs/checkpoints.py).
        shapes: shape and dtype of every model parameter, by path.
        adapters: shapes of LoRA factors and of the scales of int8 kernels.
        frozen: shapes of frozen models saved with it (`lm/models/frozen.py`).
    """

    folder: AnyPath
    metadata: Mapping[str, Any]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    adapters: Mapping[str, jax.ShapeDtypeStruct]
    frozen: Mapping[str, jax.ShapeDtypeStruct]

    @property
    def step(self) -> int:
        """Number of updates at the time of saving."""
        return self.metadata["step"]


def restore_run(
    workdir: Path,
    overrides: Mapping[str, str],
    log: Log,
    *,
    average: int = 1,
    best: bool = False,
    any_batch: bool = False,
    step: int | None = None,
    heads_optional: bool = False,
    frozen: bool = False,
) -> tuple[Experiment, Params, int]:
    """Restore a run on all devices, replicated unless the overrides name a mesh.

    Args:
        workdir: local folder of the run.
        overrides: configuration keys for this process, by dotted path.
        log: called with lines for the user.
        average: number of newest checkpoints to average.
        best: read the checkpoint kept by `--config.eval.best`.
        any_batch: set batch sizes to one example per device (for decoding).
        step: step of the checkpoint to read; None: the newest.
        heads_optional: see `restore_params`.
        frozen: also restore the frozen models used by the loss.

    Returns:
        The experiment with the run's tokenizer (if any), the parameters with LoRA updates merged,
        and their step.
    """
    changed = MERGED_OVERRIDES | {f"parallel.mesh.{axis}": "1" for axis in AXES}
    changed |= {"parallel.preset": "custom", "parallel.mesh.data": "-1"}
    if not frozen:
        changed |= WITHOUT_FROZEN
    if any_batch:
        one_a_device = str(len(jax.devices()))
        changed |= {"data.batch_size": one_a_device, "eval.batch_size": one_a_device}
        changed |= {"train.microbatches": "1"}
    config = load_run_config(workdir, changed | dict(overrides))
    tokenizer = load_tokenizer(workdir) if (workdir / "tokenizer").is_dir() else None
    experiment = build_untraced(config, jax.devices(), tokenizer)
    return experiment, *restore_params(
        experiment, workdir, log, average, best, step, heads_optional
    )


def load_tokenizer(workdir: Path) -> Tokenizer:
    """Load the tokenizer that the run was trained with; UserError if it was replaced."""
    tokenizer = load_saved_tokenizer(workdir / "tokenizer")
    metadata = read_run_metadata(workdir)
    assert metadata is not None
    if tokenizer.digest != metadata["fingerprint"]["tokenizer"]:
        raise UserError(f"the run in {storage_path(workdir)} was trained with another tokenizer")
    return tokenizer


def restore_params(
    experiment: Experiment,
    workdir: Path,
    log: Log,
    average: int = 1,
    best: bool = False,
    step: int | None = None,
    heads_optional: bool = False,
) -> tuple[Params, int]:
    """Restore the parameters of a run, sharded as `experiment` shards them.

    Args:
        experiment: experiment without LoRA; LoRA updates are merged into the kernels.
        workdir: local folder of the run.
        log: called with lines for the user.
        average: number of newest checkpoints to average.
        best: read the checkpoint kept by `--config.eval.best`.
        step: step of the checkpoint to read, and newest one of an average; None: the newest.
        heads_optional: ignore heads and modules used only in training that either the model or the
            run lacks, for a model imported without them.

    Returns:
        Nested parameters, and the step of the newest checkpoint read.

    Raises:
        UserError: the model's parameters differ from those of the run, or there is no undamaged
            checkpoint of `step`.
    """
    shapes = flat(experiment.inference_shapes)
    checkpoints = saved_checkpoints(workdir / BEST_FOLDER if best else workdir, log)
    if step is not None:
        there = ", ".join(str(saved.step) for saved in reversed(checkpoints))
        checkpoints = [saved for saved in checkpoints if saved.step <= step]
        if not checkpoints or checkpoints[0].step != step:
            raise UserError(
                f"no checkpoint of step {step} in {storage_path(workdir)}; there are {there}"
            )
    beside = {path: x for path, x in checkpoints[0].frozen.items() if path in shapes}
    found = {**checkpoints[0].shapes, **beside}
    infos = experiment.param_infos.items()
    heads = {path for path, info in infos if info.role.part in ("pretraining", "task")}
    heads |= {path for path in shapes if path.partition("/")[0] in TRAINING_ONLY}
    if heads_optional:
        modules = {path.partition("/")[0] for path in shapes}
        shapes = {path: x for path, x in shapes.items() if path in found or path not in heads}
        found = {path: x for path, x in found.items() if path.partition("/")[0] in modules}
    for path in sorted({*shapes, *found}):
        if is_frozen(path) and path not in found:
            raise UserError(
                f"the run in {storage_path(workdir)} has no frozen model, which "
                f"--config.objective.name={experiment.config.objective.name} compares with"
            )
        if path in heads - found.keys():
            raise UserError(
                f"the run in {storage_path(workdir)} has no {path}, which "
                f"--config.objective.name={experiment.config.objective.name} trains"
            )
        if path not in shapes or path not in found or shapes[path].shape != found[path].shape:
            raise UserError(
                f"{path} differs from the run in {storage_path(workdir)}: "
                "do not override its model configuration"
            )
    shardings = {
        path: x for path, x in flat(experiment.inference_sharding).items() if path in shapes
    }
    params, steps = mean_params(checkpoints, average, shardings, log)
    if step is not None and steps[0] != step:
        raise UserError(f"the checkpoint of step {step} in {storage_path(workdir)} is damaged")
    if average > 1:
        log(f"mean of the checkpoints of steps {', '.join(map(str, steps))}")
    return nested(params), steps[0]


def saved_checkpoints(source: AnyPath, log: Log) -> list[SavedCheckpoint]:
    """Return the readable checkpoints, newest first.

    Args:
        source: folder of a run, or of one checkpoint (then that one and older ones).
        log: called with a line for every damaged checkpoint.

    Raises:
        UserError: there is no readable checkpoint.
    """
    found = []
    for folder in _folders(storage_path(source)):
        saved, problem = _attempt(partial(_open, folder))
        if on_all_hosts(saved is not None):
            found.append(saved)
        elif folder.exists():  # otherwise the training process has deleted it meanwhile
            log(f"{folder} is damaged ({problem or 'on another host'}); skipped")
    if not found:
        raise UserError(f"no checkpoint in {source}")
    return found


def read_adapters(saved: SavedCheckpoint) -> dict[str, np.ndarray]:
    """Read and verify the LoRA factors of a checkpoint, by path.

    Raises:
        UserError: the checkpoint is damaged.
    """
    found, problem = _attempt(partial(_restored, saved, saved.adapters))
    if found is None:
        raise UserError(f"{saved.folder} is damaged ({problem})")
    return {path: np.asarray(x) for path, x in flat(found["params"]).items()}


def mean_params(
    checkpoints: Sequence[SavedCheckpoint],
    n: int,
    shardings: Mapping[str, NamedSharding],
    log: Log,
) -> tuple[FlatParams, list[int]]:
    """Average parameters over the newest undamaged checkpoints, in float32 (Vaswani 2017, §6.1).

    Model state is taken from the newest one.

    Args:
        checkpoints: checkpoints, newest first.
        n: number of checkpoints to average.
        shardings: sharding of each parameter by path; other parameters are not read. Paths of model
            state start with "model_state/".
        log: called with a line for every damaged checkpoint.

    Returns:
        Parameters by path, and the steps of the checkpoints read.

    Raises:
        UserError: there are fewer than `n` undamaged checkpoints.
    """
    total: FlatParams = {}
    newest_state: FlatParams = {}
    steps: list[int] = []
    for saved in checkpoints:
        params, problem = _attempt(partial(_read, saved, shardings))
        if not on_all_hosts(params is not None):
            log(f"{saved.folder} is damaged ({problem or 'on another host'}); skipped")
            continue
        assert params is not None
        state = {path: x for path, x in params.items() if path.startswith(f"{MODEL_STATE}/")}
        newest_state = newest_state if steps else state
        params = {path: x for path, x in params.items() if path not in state}
        total = _add(total, params) if total else params
        steps.append(saved.step)
        if len(steps) == n:
            return (_divide(total, n) if n > 1 else total) | newest_state, steps
    raise UserError(
        f"cannot average {n} checkpoints: {checkpoints[0].folder.parent} has only {len(steps)}; "
        f"train with --config.checkpoint.keep_last={n} or more"
    )


def _folders(source: AnyPath) -> list[AnyPath]:
    """Return checkpoint folders, newest first."""
    run = source / "checkpoints"
    parent, newest = (run, None) if run.is_dir() else (source.parent, source.name)
    if not source.is_dir() or (newest and not is_step(newest)):
        return []
    numbered = (folder for folder in parent.iterdir() if is_step(folder.name))
    steps = (int(folder.name) for folder in numbered if is_committed(folder))
    kept = (step for step in steps if newest is None or step <= int(newest))
    return [parent / str(step) for step in sorted(kept, reverse=True)]


def _attempt(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return (result, None), or (None, error as one line)."""
    try:
        return function(), None
    except Exception as error:  # a damaged file can raise anything
        return None, one_line(error)


def _reader() -> ocp.Checkpointer:
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            state=ocp.PyTreeCheckpointHandler(), metadata=ocp.JsonCheckpointHandler()
        )
    )


def _open(folder: AnyPath) -> SavedCheckpoint:
    with _reader() as reader:
        state = reader.metadata(folder).item_metadata["state"]
        tree = with_state(state["params"], state.get(MODEL_STATE))
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        metadata = reader.restore(folder, args=args)["metadata"]
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat(tree).items()
    }
    adapters = {path: leaf for path, leaf in leaves.items() if kernel_of(path)}
    frozen = {path: leaf for path, leaf in leaves.items() if is_frozen(path)}
    shapes = {path: x for path, x in leaves.items() if path not in adapters and path not in frozen}
    if adapters:  # adapters that are added to the reference
        frozen |= {reference_path(path): leaf for path, leaf in shapes.items()}
    return SavedCheckpoint(folder, metadata, shapes, adapters, frozen)


def _read(saved: SavedCheckpoint, shardings: Mapping[str, NamedSharding]) -> FlatParams:
    base = {path for path in shardings if saved.adapters and path.startswith(reference_path(""))}
    read = {path: sharding for path, sharding in shardings.items() if path not in base}
    there = {**saved.shapes, **saved.frozen}
    target = {
        path: jax.ShapeDtypeStruct(there[path].shape, there[path].dtype, sharding=sharding)
        for path, sharding in read.items()
    }
    for path, leaf in saved.adapters.items():
        if (kernel := kernel_of(path)) in read:
            everywhere = NamedSharding(read[kernel].mesh, PartitionSpec())
            target[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)
    restored = _restored(saved, target)
    params = with_state(restored["params"], restored.get(MODEL_STATE))
    if len(target) == len(read):
        return flat(params)
    alpha = saved.metadata["config"]["lora"]["alpha"]
    merged = jax.jit(lambda params: flat(merge_lora(params, alpha)), out_shardings=read)
    if not base:
        return merged(params)
    start = jax.jit(lambda params: flat(merge_lora(params, 0.0)), out_shardings=read)(params)
    return merged(params) | {path: start[path.removeprefix(reference_path(""))] for path in base}


def _restored(saved: SavedCheckpoint, target: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    """Restore arrays of a checkpoint; ValueError if their checksums do not match."""
    own = nested(target)
    item = with_state({}, own.pop(MODEL_STATE, {})) | {"params": own}
    args = ocp.args.PyTreeRestore(
        item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    with _reader() as reader:
        restored = reader.restore(saved.folder, args=ocp.args.Composite(state=args))["state"]
    recorded = saved.metadata["checksums"]
    if any(recorded[path] != value for path, value in checksums(restored).items()):
        raise ValueError("its arrays do not match their checksums")
    return restored


@jax.jit
def _add(total: FlatParams, params: FlatParams) -> FlatParams:
    return jax.tree.map(jnp.add, total, params)


@jax.jit
def _divide(total: FlatParams, n: int) -> FlatParams:
    return jax.tree.map(lambda x: x / n, total)


# --- merged run


def require_empty(folder: Path) -> None:
    """Raise UserError on all processes unless a folder is empty or missing.

    No process returns before all have checked, so that one may write there afterwards.
    """
    is_empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not on_all_hosts(is_empty):
        where = " on another host" if is_empty else ""
        raise UserError(f"{folder} is not an empty folder{where}; name another")


def merge_run(workdir: Path, to: Path, average: int, overrides: dict[str, str], log: Log) -> int:
    """Write a copy of a run to the folder `to`, with LoRA updates merged into the kernels.

    Args:
        workdir: folder of the run.
        to: empty folder of the new run.
        average: number of newest checkpoints to average.
        overrides: configuration for this process (such as its mesh); not saved.
        log: called with lines for the user.

    Returns:
        Step of the newest checkpoint read.

    Raises:
        UserError: `to` is not empty.
    """
    require_empty(to)
    config = load_run_config(workdir, MERGED_OVERRIDES)
    experiment = build(load_run_config(workdir, MERGED_OVERRIDES | overrides), jax.devices())
    params, step = restore_params(experiment, workdir, log, average)
    count = jax.device_put(np.int32(step), experiment.replicated)
    state = replace(experiment.init_state(), step=count)
    state = state.with_inference_params(params)
    saved = saved_checkpoints(workdir, log)[0].metadata
    kept = {name: saved[name] for name in ("given", "history") if name in saved}
    metadata = run_metadata(config, saved["fingerprint"]) | kept
    if is_primary_host():
        shutil.copytree(workdir / "tokenizer", to / "tokenizer")
        if (metrics := workdir / "metrics.jsonl").is_file():
            shutil.copy(metrics, to)
        write_atomically(to / RUN_FILE, json.dumps(metadata, indent=1))
    checkpoints = Checkpoints(to / "checkpoints", config.checkpoint, metadata)
    checkpoints.save(step, state)
    checkpoints.close()
    return step
