"""Workdir of an existing run: run.json, and what earlier starts left.

`checkpoints.py` creates the workdir of a new run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from lm import config as configs
from lm.config.registries import SCHEMA
from lm.errors import UserError
from lm.parallel.mesh import is_primary_host, on_all_hosts
from lm.storage import AnyPath, is_committed, is_step, read_json, storage_path

RUN_FILE = "run.json"
BATCH_SIZE = "data.batch_size"

Metadata = dict[str, Any]
Change = Callable[[Metadata, Metadata], Metadata]

# Overrides that turn the configuration of a LoRA run into that of the merged model.
MERGED_OVERRIDES = {"lora.rank": "0", "optimizer.freeze": "", "init.from": ""}


def load_run_config(workdir: Path, overrides: Mapping[str, str]) -> ConfigDict:
    """Return the configuration of a run with overrides `{path: text}` applied."""
    if not (workdir / RUN_FILE).is_file():
        raise UserError(f"no run in {storage_path(workdir)}: it has no {RUN_FILE}")
    config = configs.read_run_file(workdir / RUN_FILE)
    for path, text in overrides.items():
        configs.set_value(config, path, configs.parse_value(path, text))
    configs.validate(config)
    return config


def history_of(metadata: Mapping[str, Any]) -> list[Metadata]:
    """Return the change history of a run; [] if it was never changed.

    Entries are in order: {"step", "changed"} with the old and new value of each key that changed
    after that step, or {"step", "forked_from"}.

    Raises:
        UserError: the history is damaged.
    """
    history = metadata.get("history", [])
    if not isinstance(history, list) or not all(_is_entry(entry) for entry in history):
        raise UserError(f"{RUN_FILE} is damaged: its history cannot be read")
    return history


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or type(entry.get("step")) is not int or entry["step"] < 0:
        return False
    changed = entry.get("changed", {})
    pairs = changed.values() if isinstance(changed, dict) else [None]
    sizes = changed.get(BATCH_SIZE, [1]) if isinstance(changed, dict) else []
    return all(isinstance(pair, list) and len(pair) == 2 for pair in pairs) and all(
        type(size) is int and size > 0 for size in sizes
    )


def metadata_at(metadata: Metadata, step: int) -> Metadata:
    """Return a run's metadata as of a checkpoint's step, with the configuration flattened."""
    values, digests = dict(configs.flatten(metadata["config"])), dict(metadata["fingerprint"])
    for entry in reversed(history_of(metadata)):
        if entry["step"] >= step:
            values |= {path: old for path, (old, _) in entry.get("changed", {}).items()}
            for name in entry.get("added", ()):
                digests.pop(name, None)
    return metadata | {"config": values, "fingerprint": digests}


def first_row(metadata: Mapping[str, Any]) -> int:
    """Return the row offset of step 0 that matches the current batch size.

    With it, batches continue at the first row that no earlier batch had, despite size changes.
    """
    rows = step = 0
    for entry in history_of(metadata):
        if BATCH_SIZE in entry.get("changed", {}):
            size, _ = entry["changed"][BATCH_SIZE]
            rows += (entry["step"] - step) * size
            step = entry["step"]
    return rows - step * metadata["config"]["data"]["batch_size"]


# --- files of earlier starts


def continued(
    workdir: Path,
    metadata: Metadata,
    fingerprint: Mapping[str, Any],
    change: Change | None = None,
) -> Metadata:
    """Check a start against the run in the workdir, if there is one.

    Args:
        workdir: local folder of the run.
        metadata: metadata of this start (`checkpoints.run_metadata`).
        fingerprint: digests of tokenizer and data.
        change: see `checkpoints.prepare_workdir`.

    Returns:
        Metadata of the run.

    Raises:
        UserError: the workdir holds another run, or processes find different runs.
    """
    before = _earlier_run(workdir)
    if jax.process_count() > 1:
        _require_same_run(workdir, before, fingerprint)
    if before is not None:
        metadata |= {"history": before["history"]} if "history" in before else {}
        if change is not None:
            metadata = change(before, metadata)
            before = with_changes(before, metadata)
        check_same(workdir, before, metadata, "continue it with --change, or ")
    return metadata


def _earlier_run(workdir: Path) -> Metadata | None:
    """Return the metadata of the run in the workdir; None if there is none.

    If run.json is missing or damaged, it is recovered from the newest readable checkpoint. A start
    that failed before its first step does not count as a run.
    """
    try:
        metadata = read_run_metadata(workdir)
    except UserError:
        metadata = _newest_metadata(workdir)
        if metadata is None:
            raise
    else:
        metadata = metadata or _newest_metadata(workdir)
    return metadata if has_steps(workdir) else None


def _newest_metadata(workdir: Path) -> Metadata | None:
    for step in reversed(checkpoint_steps(workdir)):
        if saved := saved_metadata(storage_path(workdir / "checkpoints") / str(step)):
            return saved
    return None


def saved_metadata(checkpoint: AnyPath) -> Metadata | None:
    """Return the metadata of a checkpoint; None if missing or damaged."""
    with contextlib.suppress(UserError, FileNotFoundError):
        saved = read_json(checkpoint / "metadata" / "metadata")
        if all(isinstance(saved.get(name), dict) for name in ("config", "fingerprint")):
            return saved
    return None


def damaged_steps(workdir: Path) -> list[str]:
    """Return the names of checkpoints that were moved to the folder "damaged"."""
    folder = storage_path(workdir / "damaged")
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry.name for entry in entries if entry.name[:1].isdigit())


def has_steps(workdir: Path) -> bool:
    """Return whether the workdir has checkpoints, damaged ones, or metrics."""
    metrics = workdir / "metrics.jsonl"
    written = metrics.is_file() and metrics.stat().st_size > 0
    return bool(written or checkpoint_steps(workdir) or damaged_steps(workdir))


def set_aside(folder: AnyPath, step: int) -> None:
    """Move a damaged checkpoint to the folder "damaged" next to `folder`."""
    if is_primary_host():
        aside = folder.parent / "damaged"
        aside.mkdir(exist_ok=True)
        (aside / ".keep").touch()  # buckets have no empty folders
        n = sum(1 for _ in aside.glob(f"{step}*"))
        (folder / str(step)).rename(aside / (f"{step}.{n}" if n else str(step)))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"set aside {step}")


def require_no_lost_steps(workdir: Path) -> None:
    """Raise UserError if a run would restart at step 0 although it had checkpoints."""
    if lost := damaged_steps(workdir):
        raise UserError(
            f"no checkpoint of {storage_path(workdir)} can be read (damaged: {', '.join(lost)}): "
            f"put an undamaged copy into {storage_path(workdir / 'checkpoints')}, or begin again "
            "at step 0 with --restart, which keeps the old run in a folder restarted.N"
        )


def set_lost_run_aside(workdir: Path) -> None:
    """Move the run in the workdir to its folder restarted.N if it has lost all checkpoints.

    A run that can continue is left alone, since a supervisor may repeat the same command.

    Raises:
        UserError: the run is in a bucket, or the workdir is not writable.
    """
    lost = bool(damaged_steps(workdir)) and not checkpoint_steps(workdir)
    if not on_all_hosts(lost):
        return
    if not isinstance(storage_path(workdir), Path):
        raise UserError("--restart is not supported for runs in a bucket; use another --workdir")
    if is_primary_host() and workdir.is_dir():
        entries = [e for e in workdir.iterdir() if not e.name.startswith(("restarted.", ".lock"))]
        n = sum(1 for _ in workdir.glob("restarted.*"))
        try:
            for entry in entries:
                (workdir / f"restarted.{n}").mkdir(exist_ok=True)
                entry.rename(workdir / f"restarted.{n}" / entry.name)
        except OSError as error:
            raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}") from None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("moved the run aside")


def _require_same_run(
    workdir: Path, before: Metadata | None, fingerprint: Mapping[str, Any]
) -> None:
    """Compare data and the run found in the workdir across processes."""
    from lm.parallel.agreement import require_agreement

    facts: Metadata = {f"data of {k}": v for k, v in fingerprint.items()}
    facts["the run in --workdir"] = None
    if before is not None:
        text = json.dumps(before, sort_keys=True).encode()
        facts["the run in --workdir"] = sha256(text).hexdigest()[:12]
    facts["the newest checkpoint"] = max(checkpoint_steps(workdir), default=None)
    require_agreement(facts)


def checkpoint_steps(workdir: Path) -> list[int]:
    """Return the steps of a run's complete checkpoints, ascending."""
    folder = storage_path(workdir / "checkpoints")
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(e.name) for e in entries if is_step(e.name) and is_committed(e))


def read_run_metadata(workdir: Path) -> Metadata | None:
    """Read run.json; None if there is no run."""
    try:
        metadata = read_json(workdir / RUN_FILE)
    except FileNotFoundError:
        return None
    for name in ("config", "fingerprint"):
        if not isinstance(metadata.get(name), dict):
            raise UserError(f"{storage_path(workdir / RUN_FILE)} is damaged (it has no {name!r})")
    return metadata


def changed_keys(old: Mapping, new: Mapping) -> dict[str, tuple[Any, Any]]:
    """Return old and new value of every key that differs, except free keys.

    Keys added after `old` was saved count as having their default there, so old runs continue.
    """
    before, after = dict(configs.flatten(old)), dict(configs.flatten(new))
    added = after.keys() & SCHEMA.keys() - before.keys()
    before |= {path: SCHEMA[path].default for path in added}
    return {
        path: (before.get(path), after.get(path))
        for path in sorted({*before, *after})
        if not (path in SCHEMA and SCHEMA[path].free)
        and _plain(before.get(path)) != _plain(after.get(path))
    }


def differences(old: Mapping, new: Mapping) -> list[str]:
    """Format `changed_keys` for the user, as `--config.KEY: old → new`."""
    return [
        f"--config.{path}: {' → '.join('(none)' if x is None else str(x) for x in values)}"
        for path, values in changed_keys(old, new).items()
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def with_changes(before: Metadata, now: Metadata) -> Metadata:
    """Return a run's metadata with the current configuration and fingerprints of added sources."""
    changed = changed_keys(before["config"], now["config"])
    added = now["fingerprint"] if "data.source" in changed else {}
    fingerprint = {**added, **before.get("fingerprint", {})}
    return before | {"config": now["config"], "fingerprint": fingerprint}


def check_same(
    workdir: Path, before: Mapping[str, Any], now: Mapping[str, Any], advice: str = ""
) -> None:
    """Raise UserError if configuration or data of a run have changed."""
    different = differences(before["config"], now["config"])
    if different:
        raise UserError(
            f"{storage_path(workdir)} holds a run of a different configuration "
            f"({'; '.join(different)}); {advice}use another --workdir"
        )
    old, new = before.get("fingerprint", {}), now["fingerprint"]
    changed = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if changed:
        raise UserError(
            f"changed since the run in {storage_path(workdir)} was started: {', '.join(changed)}; "
            "restore the data, or use another --workdir"
        )
