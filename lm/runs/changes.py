"""Configuration changes of a run, and forks: new runs that start from another run's checkpoint.

Both append to the history in run.json and in checkpoint metadata (`workdir.history_of`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from lm import config as configs
from lm.errors import UserError
from lm.experiment import Experiment, build
from lm.parallel.mesh import is_primary_host, on_all_hosts
from lm.runs.checkpoints import Log, checksums, one_line, restored_as
from lm.runs.workdir import (
    BATCH_SIZE,
    RUN_FILE,
    Change,
    Metadata,
    changed_keys,
    check_same,
    checkpoint_steps,
    damaged_steps,
    differences,
    first_row,
    has_steps,
    history_of,
    read_run_metadata,
    saved_metadata,
    with_changes,
)
from lm.storage import (
    COMMITTED,
    AnyPath,
    is_step,
    open_run_folder,
    storage_path,
    upload_changes,
    write_atomically,
)

# Prefixes of keys that may change during a run; keys that define the model, objective or data order
# may not. A change of the training state is detected by comparing its arrays.
_CHANGEABLE = (
    BATCH_SIZE,
    "eval.",
    "model.activation_dropout",
    "model.attention_dropout",
    "model.balance_loss",
    "model.dropout",
    "model.dtype",
    "model.router_",
    "objective.label_smoothing",
    "objective.mask_rate",
    "objective.z_loss",
    "optimizer.",
    "schedule.",
    "train.",
)
_FIXED = ("optimizer.name", "optimizer.freeze")
# Keys that may change if all batches before the change stay the same.
_MIXTURE = frozenset(f"data.{name}" for name in ("source", "weights", "epochs", "schedule"))


def change_of(
    experiment: Experiment,
    workdir: Path,
    now: Metadata,
    change: bool,
    source: str | None,
    log: Log,
) -> Change | None:
    """Fork into the workdir if requested; return the change recorder, or None.

    Args:
        experiment: experiment that continues the run.
        workdir: folder of the run.
        now: metadata of this start.
        change: whether this start may change the configuration.
        source: RUN or RUN@STEP to fork; None: no fork.
        log: called with lines about the forked checkpoint and the changes.
    """
    if source is not None:
        fork(source, experiment, workdir, now, log)
    return partial(record, experiment, workdir, log) if change else None


def record(
    experiment: Experiment, workdir: Path, log: Log, before: Metadata, now: Metadata
) -> Metadata:
    """Return the metadata of a start, with its configuration changes added to the history.

    Args:
        experiment: experiment that continues the run.
        workdir: folder of the run.
        log: called with a line that lists the changes.
        before: metadata of the run.
        now: metadata of this start.

    Raises:
        UserError: a changed key is fixed, or the change would alter the training state.
    """
    return _record(experiment, max(checkpoint_steps(workdir), default=0), log, before, now)


def _record(
    experiment: Experiment, step: int, log: Log, before: Metadata, now: Metadata
) -> Metadata:
    changed = changed_keys(before["config"], now["config"])
    if not changed:
        return now
    fixed = [path for path in changed if not path.startswith(_CHANGEABLE) or path in _FIXED]
    data = experiment.config.data
    if _MIXTURE.intersection(fixed):
        from lm.data.mixture import continues_mixture

        then = ConfigDict(before["config"]["data"])
        if not first_row(before) and continues_mixture(then, data, step):
            fixed = [path for path in fixed if path not in _MIXTURE]
    if BATCH_SIZE in changed and (data.order == "contiguous" or data.schedule or data.batch_ramp):
        # Each row reads its own range of the corpus, and a schedule's steps would move.
        fixed.append(BATCH_SIZE)
    if fixed:
        raise UserError(
            f"a run cannot change {', '.join(f'--config.{path}' for path in fixed)}: start another "
            "run, with its parameters by --config.init.from=RUN"
        )
    if experiment.config.train.steps < step:
        raise UserError(
            f"--config.train.steps={experiment.config.train.steps}: the run is at step {step}"
        )
    _require_same_state(experiment, changed)
    named = differences(before["config"], now["config"])
    log(f"changed from step {step} on: {'; '.join(named)}")
    entry: dict[str, Any] = {"step": step}
    entry["changed"] = {path: list(values) for path, values in changed.items()}
    if "data.source" in changed:
        entry["added"] = sorted(now["fingerprint"].keys() - before["fingerprint"].keys())
    return now | {"history": [*history_of(now), entry]}


def _require_same_state(experiment: Experiment, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise UserError if a change alters the shapes of the training state."""
    config = experiment.config.copy_and_resolve_references()
    for path, (old, _) in changed.items():
        if old is not None:
            configs.set_value(config, path, tuple(old) if isinstance(old, list) else old)
    earlier = build(config, experiment.mesh.devices.flatten().tolist(), experiment.tokenizer)

    def arrays(state: Any) -> dict[str, tuple]:
        leaves = jax.tree.leaves_with_path(state)
        return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in leaves}

    before, after = arrays(earlier.state_shapes), arrays(experiment.state_shapes)
    unlike = sorted({path for path, _ in before.items() ^ after.items()})
    if unlike:
        keys = ", ".join(f"--config.{path}" for path in changed)
        raise UserError(
            f"{keys}: this changes the training state ({len(unlike)} arrays, such as "
            f"{unlike[0]}): start another run, with its parameters by --config.init.from=RUN"
        )


def settle(workdir: Path, metadata: Metadata, first_step: int) -> Metadata:
    """Drop changes later than the restored step from the metadata, and write it to run.json.

    A change is recorded at the newest checkpoint before it is known whether that can be restored.

    Raises:
        UserError: the run is a fork that lacks the checkpoint it starts from.
    """
    history = history_of(metadata)
    for entry in history:
        if "forked_from" in entry and entry["step"] > first_step:
            raise UserError(
                f"the fork in {storage_path(workdir)} is not complete: start it again with "
                f"--fork {entry['forked_from']}"
            )
    history = [entry | {"step": min(entry["step"], first_step)} for entry in history]
    if history != metadata["history"]:
        metadata = metadata | {"history": history}
        if is_primary_host():
            write_atomically(workdir / RUN_FILE, json.dumps(metadata, indent=1))
    return metadata


# --- forks


def fork(source: str, experiment: Experiment, workdir: Path, now: Metadata, log: Log) -> None:
    """Fill the workdir of a new run with another run's checkpoint, unless that was already done.

    Lines of metrics.jsonl are copied too, so that curves are complete.

    Args:
        source: RUN or RUN@STEP; without a step, the newest checkpoint.
        experiment: experiment that continues the run.
        workdir: folder of the new run.
        now: metadata of this start.
        log: called with lines about the checkpoint and the changes.

    Raises:
        UserError: the checkpoint does not exist or is damaged, the workdir already holds a run, or
            configuration and data do not continue it.
    """
    run, step = _parse(source)
    name = str(storage_path(run))
    if has_steps(workdir):
        history = history_of(read_run_metadata(workdir) or {})
        forks = [entry["forked_from"] for entry in history if "forked_from" in entry]
        there, _, at = forks[-1].rpartition("@") if forks else ("", "", "-1")
        if there != name or step not in (None, int(at)):
            raise UserError(
                f"--workdir {storage_path(workdir)} holds a run already: a fork needs a new workdir"
            )
        if checkpoint_steps(workdir) or damaged_steps(workdir):
            return
    steps = checkpoint_steps(run)
    step = max(steps, default=0) if step is None else step
    if step not in steps:
        known = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
        raise UserError(f"--fork {source}: no checkpoint of step {step} in {name}; {known}")
    checkpoint = storage_path(run / "checkpoints") / str(step)
    before = saved_metadata(checkpoint)
    if before is None:
        raise UserError(f"--fork {source}: {checkpoint} is damaged (metadata); fork another step")
    history = [*history_of(before), {"step": step, "forked_from": f"{name}@{step}"}]
    changed = _record(experiment, step, log, before, now | {"history": history})
    check_same(run, with_changes(before, changed), now)
    problem = _damage(experiment, checkpoint, before)
    if not on_all_hosts(not problem):
        problem = problem or "on another host"
        raise UserError(f"--fork {source}: {checkpoint} is damaged ({problem}); fork another step")
    if is_primary_host():
        try:
            _copy(run, checkpoint, workdir, changed)
        except OSError as error:
            if not checkpoint.exists():
                raise UserError(
                    f"--fork {source}: its run deleted {checkpoint} meanwhile"
                ) from None
            raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}") from error
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("fork")
    log(f"forked from {name}, step {step}")


def _parse(source: str) -> tuple[Path, int | None]:
    """Parse RUN or RUN@STEP; the name of a run may itself end in @STEP."""
    run = open_run_folder(source)
    place, _, at = source.rpartition("@")
    if place and is_step(at) and not (run / RUN_FILE).is_file():
        return open_run_folder(place), int(at)
    return run, None


def _damage(experiment: Experiment, checkpoint: AnyPath, metadata: Metadata) -> str:
    """Describe damage to the arrays of a checkpoint; "" if there is none."""
    target = restored_as(experiment.state_shapes, experiment.state_sharding)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    try:
        with ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler())
        ) as reader:
            state = reader.restore(checkpoint, args=args)["state"]
        same = checksums(state) == metadata["checksums"]
    except Exception as error:  # a damaged file can raise anything
        return one_line(error)
    return "" if same else "its arrays do not match their checksums"


def _copy(run: Path, checkpoint: AnyPath, workdir: Path, metadata: Metadata) -> None:
    """Copy a checkpoint atomically, after the other files that its run needs."""
    target = storage_path(workdir / "checkpoints") / checkpoint.name
    in_bucket = not isinstance(target, Path)
    partial = target.with_name(f".{checkpoint.name}.partial")
    source, place = epath.Path(checkpoint), epath.Path(target if in_bucket else partial)
    if place.exists():
        place.rmtree()
    place.mkdir(parents=True)
    for file in _files(source):
        if file.name != COMMITTED:
            to = place / file.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            file.copy(to)
    write_atomically(workdir / RUN_FILE, json.dumps(metadata, indent=1))
    metrics = run / "metrics.jsonl"
    if metrics.is_file():
        (workdir / metrics.name).write_bytes(metrics.read_bytes())
    upload_changes()
    if in_bucket:
        (place / COMMITTED).write_text("")
    else:
        partial.rename(target)


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry
