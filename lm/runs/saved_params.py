"""Reading the parameters of a run's checkpoints, and nothing else of them; a run is never changed.

What is read is checked against its checksums, laid out on any mesh, merged where the run adapted
kernels (`optim/lora.py`), and averaged over checkpoints. Parameters are dicts by path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from lm.errors import UserError
from lm.optim.lora import merge
from lm.optim.parameter_groups import LORA, flat, nested
from lm.runs.checkpoints import checksums, on_all_hosts, one_line
from lm.storage import AnyPath, is_whole, origin

Report = Callable[[str], None]
Params = dict[str, jax.Array]


@dataclass(frozen=True)
class Saved:
    """One checkpoint: its metadata, and the shape of every parameter of the model in it."""

    folder: AnyPath
    metadata: Mapping[str, Any]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    adapters: Mapping[str, jax.ShapeDtypeStruct]

    @property
    def step(self) -> int:
        return self.metadata["step"]


def saved_checkpoints(source: AnyPath, report: Report) -> list[Saved]:
    """The readable checkpoints, newest first, of a run's folder, or up to one checkpoint's folder.

    UserError if there is none; `report` is told of damaged ones.
    """
    found = []
    for folder in _folders(origin(source)):
        saved, problem = _attempt(partial(_open, folder))
        if on_all_hosts(saved is not None):
            found.append(saved)
        else:
            report(f"{folder} is damaged ({problem or 'on another host'}); left out")
    if not found:
        raise UserError(f"no checkpoint in {source}")
    return found


def mean_params(
    checkpoints: Sequence[Saved],
    n: int,
    shardings: Mapping[str, NamedSharding],
    report: Report,
) -> tuple[Params, list[int]]:
    """The named parameters, averaged over the newest `n` undamaged checkpoints; their steps.

    The mean is in float32 (Vaswani et al. 2017, section 6.1). UserError if there are fewer.
    """
    total: Params = {}
    steps: list[int] = []
    for saved in checkpoints:
        params, problem = _attempt(partial(_read, saved, shardings))
        if not on_all_hosts(params is not None):
            report(f"{saved.folder} is damaged ({problem or 'on another host'}); left out")
            continue
        assert params is not None
        total = _add(total, params) if total else params
        steps.append(saved.step)
        if len(steps) == n:
            return (_divide(total, n) if n > 1 else total), steps
    raise UserError(
        f"an average of {n} checkpoints needs as many: {checkpoints[0].folder.parent} has "
        f"{len(steps)}; train with --config.checkpoint.keep_last={n} or more"
    )


def _folders(source: AnyPath) -> list[AnyPath]:
    """Of checkpoints, newest first."""
    run = source / "checkpoints"
    parent, newest = (run, None) if run.is_dir() else (source.parent, source.name)
    if not source.is_dir() or (newest and not newest.isdigit()):
        return []
    numbered = (folder for folder in parent.iterdir() if folder.name.isdigit())
    steps = (int(folder.name) for folder in numbered if is_whole(folder))
    kept = (step for step in steps if newest is None or step <= int(newest))
    return [parent / str(step) for step in sorted(kept, reverse=True)]


def _attempt(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """What it returns, or None and what went wrong."""
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


def _open(folder: AnyPath) -> Saved:
    with _reader() as reader:
        tree = reader.metadata(folder).item_metadata["state"]["params"]
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        metadata = reader.restore(folder, args=args)["metadata"]
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat(tree).items()
    }
    adapters = {path: leaf for path, leaf in leaves.items() if path.startswith(f"{LORA}/")}
    shapes = {path: leaf for path, leaf in leaves.items() if path not in adapters}
    return Saved(folder, metadata, shapes, adapters)


def _read(saved: Saved, shardings: Mapping[str, NamedSharding]) -> Params:
    target = {
        path: jax.ShapeDtypeStruct(
            saved.shapes[path].shape, saved.shapes[path].dtype, sharding=sharding
        )
        for path, sharding in shardings.items()
    }
    for path, leaf in saved.adapters.items():
        kernel = path.removeprefix(f"{LORA}/").rpartition("/")[0]
        if kernel in shardings:
            everywhere = NamedSharding(shardings[kernel].mesh, PartitionSpec())
            target[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)
    item = {"params": nested(target)}
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
    if len(target) == len(shardings):
        return flat(restored["params"])
    alpha = saved.metadata["config"]["lora"]["alpha"]
    merged = jax.jit(lambda params: flat(merge(params, alpha)), out_shardings=dict(shardings))
    return merged(restored["params"])


@jax.jit
def _add(total: Params, params: Params) -> Params:
    return jax.tree.map(jax.numpy.add, total, params)


@jax.jit
def _divide(total: Params, n: int) -> Params:
    return jax.tree.map(lambda x: x / n, total)
