"""Workdir of a training run: run.json, tokenizer/ and checkpoints/.

`run.json` holds the resolved configuration, the given values that differ from it, and digests of
tokenizer and data. Resuming a run with other data, or with another configuration without
`--change`, is an error that lists the differences (`workdir.py`). Orbax writes checkpoints
asynchronously and atomically; they are verified when read.

A checkpoint holds the training state and a metadata file: step, configuration, digests of tokenizer
and data, and a checksum of every array. Checksums do not depend on the mesh, so silent corruption
is detected on any mesh.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from lm import config as configs
from lm.config.registries import SCHEMA
from lm.data.dataset import Dataset
from lm.errors import UserError
from lm.parallel.mesh import is_primary_host, on_all_hosts
from lm.runs.workdir import RUN_FILE, Change, check_same, continued, metadata_at, set_aside
from lm.storage import AnyPath, storage_path, upload_changes, write_atomically
from lm.train_step import TrainState

BEST_FOLDER = "best"  # folder of the checkpoint kept by --config.eval.best

_FULL_SIGNS = ("No space left", "quota exceeded", "File too large")  # of the OS and TensorStore

Log = Callable[[str], None]


def ignore_line(line: str) -> None:
    """Discard a line; the default of functions that take a `Log`."""


class Checkpoints:
    """Checkpoint manager of one folder."""

    def __init__(self, folder: Path, options: ConfigDict, metadata: dict[str, Any]):
        """Open the folder.

        Args:
            folder: folder with one subfolder per checkpoint.
            options: section "checkpoint" of the configuration.
            metadata: metadata of the run, written into every checkpoint.
        """
        self._folder = storage_path(folder)
        self.metadata = metadata
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=options.keep_last,
                keep_period=options.keep_every_steps or None,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
            item_names=("state", "metadata"),
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, notes: Mapping[str, Any] | None = None) -> None:
        """Copy the state to host memory and save it in the background, after any earlier save.

        Args:
            step: number of updates so far.
            state: training state.
            notes: additional entries of the metadata file.

        Raises:
            UserError: the disk is full.
        """
        metadata = {**self.metadata, **(notes or {}), "step": step, "checksums": checksums(state)}
        with disk_errors(self._folder):
            self._manager.wait_until_finished()
            self._check_space(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_as_saved(state)),
                    metadata=ocp.args.JsonSave(metadata),
                ),
            )

    def _check_space(self, needed: int) -> None:
        """Raise UserError if the disk is too full for a checkpoint; buckets have no limit."""
        if not isinstance(self._folder, Path):
            return
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise UserError(
                f"the disk of {self._folder} has {free / 1e6:,.1f} MB left and a checkpoint may "
                f"need {needed / 1e6:,.1f} MB; older checkpoints are intact: free some space and "
                "start the same command again"
            )

    @property
    def is_saving(self) -> bool:
        """True while a background save is in progress."""
        return self._manager.is_saving_in_progress()

    def check(self) -> None:
        """Raise the error of a failed background save."""
        with disk_errors(self._folder):
            self._manager.check_for_errors()

    def restore(self, shapes: TrainState, sharding: TrainState, log: Log) -> TrainState | None:
        """Restore the newest undamaged state.

        A damaged checkpoint is reported and moved to the folder "damaged" for inspection.

        Args:
            shapes: shapes and dtypes of the state.
            sharding: sharding of every array.
            log: called with a line for every damaged checkpoint.

        Returns:
            The state; None if there is no checkpoint.
        """
        target = restored_as(shapes, sharding)
        while (step := self._manager.latest_step()) is not None:
            state, problem = self._read(step, target)
            if on_all_hosts(problem is None):
                return state
            log(f"checkpoint {step} is damaged ({problem or 'on another host'}); set aside")
            set_aside(self._folder, step)
            self._manager.reload()
        return None

    def _read(self, step: int, target: dict[str, Any]) -> tuple[TrainState | None, str | None]:
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(target), metadata=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=args)
            saved = restored["metadata"]
            same = checksums(restored["state"]) == saved["checksums"]
            foreign = saved["step"] != step or not isinstance(saved["config"], dict)
        except Exception as error:  # a damaged file can raise anything
            return None, one_line(error)
        if not same:
            return None, "its arrays do not match their checksums"
        if foreign:
            return None, "its metadata is of another step or run"
        if "fingerprint" in self.metadata:
            check_same(self._folder / str(step), saved, metadata_at(self.metadata, step))
        return TrainState(**restored["state"]), None

    def wait(self) -> None:
        """Wait until all saves are on disk."""
        with disk_errors(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until all saves are on disk, and close the manager."""
        self.wait()
        self._manager.close()


def restored_as(shapes: TrainState, sharding: TrainState) -> dict[str, Any]:
    """Return shape, dtype and sharding of every array of a state in saved form."""
    return _as_saved(
        jax.tree.map(
            lambda shape, s: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=s),
            shapes,
            sharding,
        )
    )


def _as_saved(state: TrainState) -> dict[str, Any]:
    """Return the state in saved form, without model state if the model has none."""
    saved = dict(vars(state))
    if not state.model_state:
        del saved["model_state"]
    return saved


def checksums(tree: Any) -> dict[str, int]:
    """Return a checksum of every array by path: the sum of its bits modulo 2^32.

    The sum does not depend on the order of elements, so it is the same on any mesh.
    """
    sums = jax.device_get(_sums(tree))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(value)
        for (path, _), value in zip(jax.tree.leaves_with_path(tree), sums, strict=True)
    }


@jax.jit
def _sums(tree: Any) -> list[jax.Array]:
    return [
        jnp.sum(leaf.view(f"uint{8 * leaf.dtype.itemsize}"), dtype=jnp.uint32)
        for leaf in jax.tree.leaves(tree)
    ]


def one_line(error: Exception) -> str:
    """Format an error as its type and the start of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"


@contextlib.contextmanager
def disk_errors(folder: AnyPath) -> Iterator[None]:
    """Convert full-disk errors to UserError; an unfinished checkpoint is discarded."""
    hook, sys.unraisablehook = sys.unraisablehook, _unless_loop_is_closed
    logging.getLogger("asyncio").addFilter(_unless_disk_is_full)
    try:
        yield
        sys.unraisablehook = hook
    except Exception as error:
        if not isinstance(error, UserError) and _is_full_disk(error):
            raise UserError(
                f"the disk of {folder} is full; older checkpoints are intact: "
                "free some space and start the same command again"
            ) from error
        raise


def _is_full_disk(error: BaseException | None) -> bool:
    return any(sign in str(error) for sign in _FULL_SIGNS)


def _unless_disk_is_full(record: logging.LogRecord) -> bool:
    """Filter out log records of other writes that failed on the full disk."""
    return not (record.exc_info and _is_full_disk(record.exc_info[1]))


def _unless_loop_is_closed(unraisable: Any) -> None:
    """Print an unraisable error, unless it is a TensorStore write that outlived its event loop."""
    if "loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


# --- workdir


def run_metadata(
    config: ConfigDict, fingerprint: Mapping[str, Any], given: ConfigDict | None = None
) -> dict[str, Any]:
    """Return the content of run.json.

    Args:
        config: resolved configuration.
        fingerprint: digests of tokenizer and data.
        given: configuration before it was resolved; its differing values are recorded.
    """
    values = dict(configs.flatten(config))
    before = dict(configs.flatten(given if given is not None else config))
    metadata = {
        "config": json.loads(config.to_json()),
        "given": {k: v for k, v in before.items() if k in values and v != values[k]},
        "fingerprint": fingerprint,
    }
    plugins = SCHEMA.plugins()
    return metadata | ({"plugins": plugins} if plugins else {})


def prepare_workdir(
    workdir: Path, metadata: dict[str, Any], dataset: Dataset, change: Change | None = None
) -> dict[str, Any]:
    """Create the workdir of a new run, or check an existing one against configuration and data.

    Args:
        workdir: local folder of the run.
        metadata: metadata of this start (`run_metadata`).
        dataset: tokenizer and data.
        change: called with the metadata of an existing run and of this start; returns the latter
            with the change recorded, or raises UserError. None: changes are not allowed.

    Returns:
        Metadata of the run.

    Raises:
        UserError: the workdir holds another run.
    """
    files = (workdir / RUN_FILE, workdir / "metrics.jsonl")
    folders = (storage_path(workdir / "checkpoints"), storage_path(workdir / "damaged"))
    if jax.process_count() > 1 or any(path.exists() for path in (*files, *folders)):
        metadata = continued(workdir, metadata, dataset.fingerprint, change)
    if is_primary_host():
        dataset.tokenizer.save(workdir / "tokenizer")
        write_atomically(workdir / RUN_FILE, json.dumps(metadata, indent=1))
        upload_changes()
    return metadata
