"""Execution of the stages of a corpus with datatrove; a restart continues where it stopped.

A finished task has a file completions/TASK in the folder of its stage, and is never repeated. Tasks
follow from the configuration, so that the shards do not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.io import DataFolder, get_datafolder
from datatrove.utils.logging import logger

from lm.errors import UserError, missing_package
from lm.parallel.worker_processes import end_with_parent
from lm.progress import progress_bar
from lm.storage import lock
from lm.tools.corpus.corpus_config import FREE, Config, named_sources
from lm.tools.corpus.corpus_rules import RULES
from lm.tools.corpus.corpus_stages import (
    READ,
    CorpusStage,
    plan_stages,
    tally_folder,
    work_folder,
)
from lm.tools.corpus.data_card import CARD, PAGE, CardMaker, require_documents
from lm.tools.corpus.rule_tally import merge_figures

STATE = "corpus.json"  # configuration and source digests of the corpus in a folder
EXECUTORS = ("local", "slurm", "ray")

Log = Callable[[str], None]


def make_corpus(
    config: Config, output: str, executor: str = "local", workers: int = 0, log: Log = print
) -> str:
    """Build the corpus of a configuration, or what is missing of it.

    Args:
        config: configuration.
        output: folder for shards and card; local, or an fsspec URL.
        executor: one of EXECUTORS.
        workers: concurrent tasks; 0: one per core, or as the cluster decides.
        log: called with a line for each stage.

    Returns:
        Path of the card; "" if a SLURM job will write it.

    Raises:
        UserError: the configuration or a document is invalid, no documents are left, or the folder
            holds something else.
    """
    logger.remove()  # datatrove logs to files
    try:
        folder = get_datafolder(output)
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"--output {output}: {error}") from error
    output = folder.resolve_paths("")
    with _locked(folder):
        sources = _digests(config)
        _require_same(folder, config, sources)
        page = folder.resolve_paths(PAGE)
        if folder.isfile(CARD):
            log(f"{output} is complete")
            _remove_work(folder)
            return page
        stages = plan_stages(config, output)
        stages.append(CorpusStage("card", (CardMaker(config, sources, output),), 1))
        _write_json(folder, STATE, _state(config, sources))
        run = {"local": _run_locally, "slurm": _submit, "ray": _run_on_ray}[executor]
        run(stages, config, output, workers, log)
        if executor == "slurm":
            return ""
        _remove_work(folder)
        return page


def _remove_work(folder: DataFolder) -> None:
    with contextlib.suppress(FileNotFoundError):
        folder.rm("work", recursive=True)


@contextlib.contextmanager
def _locked(folder: DataFolder) -> Iterator[None]:
    """Hold the lock of a local folder."""
    if not folder.is_local():
        yield
        return
    try:
        Path(folder.path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder.path} cannot be created: {error.strerror}") from error
    with lock(Path(folder.path) / ".lock", f"another `lm corpus` is running in {folder.path}"):
        yield


# --- state of a folder


def _digests(config: Config) -> dict[str, str]:
    sources, tests = (named_sources(config, section) for section in ("sources", "tests"))
    found = {name: source.digest() for name, source in sources.items()}
    found |= {f"test {name}": source.digest() for name, source in tests.items()}
    for name in config["rules"]:
        if digest := RULES[name].digest:
            found[f"rule {name}"] = digest(**config[name])
    return found


def _state(config: Config, sources: dict[str, str]) -> dict[str, Any]:
    values = {name: value for name, value in config.items() if name not in FREE}
    return json.loads(json.dumps({"config": values, "sources": sources}))


def _require_same(folder: DataFolder, config: Config, sources: dict[str, str]) -> None:
    """Raise UserError if a folder holds another corpus, or something else."""
    place = folder.resolve_paths("")
    if not folder.isfile(STATE):
        others = [name for name in folder.list_files() if name != ".lock"]
        if others:
            raise UserError(f"{place} holds other files ({others[0]}): use another --output")
        return
    try:
        with folder.open(STATE, "r") as file:
            before = dict(_flat(json.load(file)))
    except ValueError as error:
        raise UserError(f"{place}/{STATE} is damaged: use another --output") from error
    now = dict(_flat(_state(config, sources)))
    changed = [
        f"{name}: {before.get(name)!r} → {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise UserError(
            f"{place} holds a corpus of a different configuration or other sources "
            f"({'; '.join(changed)}): use another --output"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _write_json(folder: DataFolder, name: str, values: Any) -> None:
    with folder.open(f"{name}.part", "w") as file:
        json.dump(values, file, indent=1, ensure_ascii=False)
    folder.mv(f"{name}.part", name)


# --- executors


def _stage_folder(output: str, number: int, stage: CorpusStage) -> str:
    name = re.sub(r"\W+", "-", stage.name)[:60]
    return f"{work_folder(output)}/stages/{number:02d}-{name}"


class LocalTasks(LocalPipelineExecutor):
    """Tasks on this machine, which log only to files."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            try:
                return super()._run_for_rank(rank, local_rank, node_rank)
            finally:
                logger.remove()


def _run_locally(
    stages: Sequence[CorpusStage], config: Config, output: str, workers: int, log: Log
) -> None:
    """Run stages on this machine.

    Uses Python's process pool: datatrove's waits forever for a process that was killed.
    """
    workers = workers or os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, end_with_parent) if workers > 1 else None
    try:
        for number, stage in enumerate(stages):
            place = _stage_folder(output, number, stage)
            tasks = LocalTasks(list(stage.blocks), stage.tasks, logging_dir=place)
            left = tasks.get_incomplete_ranks()
            if not left:
                continue
            log(f"stage {number + 1} of {len(stages)}: {stage.name}, {_counted(len(left))}")
            with progress_bar(stage.name, len(left), leave=False) as bar:
                pickled = pickle.dumps(tasks)  # here: a pool may hang on unpicklable objects
                if pool is None:
                    for rank in left:
                        _run_task(pickled, rank)
                        bar.update()
                else:
                    futures = [pool.submit(_run_task, pickled, rank) for rank in left]
                    for future in as_completed(futures):
                        future.result()
                        bar.update()
            _require_documents(stage, config, output)
    except BrokenProcessPool as error:
        raise UserError(
            "a process was killed, perhaps for lack of memory: start the same command again to "
            "continue; fewer --workers need less"
        ) from error
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _require_documents(stage: CorpusStage, config: Config, output: str) -> None:
    """Raise UserError if a stage has read the sources and one of them gave no documents."""
    if stage.name.startswith(READ):
        require_documents(merge_figures(tally_folder(output, READ), READ, 0), config["sources"])


def _run_task(tasks: bytes, rank: int) -> None:
    try:
        pickle.loads(tasks)._run_for_rank(rank)
    except ImportError as error:
        raise UserError(str(error)) from error


class RayTasks(RayPipelineExecutor):
    """Tasks on a Ray cluster; each records its error, which datatrove does not report."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        try:
            return super()._run_for_rank(rank, local_rank, node_rank)
        except Exception as error:
            with self.logging_dir.open(f"errors/{rank:05d}", "w") as file:
                file.write(str(error) or type(error).__name__)
            raise


def _run_on_ray(
    stages: Sequence[CorpusStage], config: Config, output: str, workers: int, log: Log
) -> None:
    """Run stages on the Ray cluster of RAY_ADDRESS, or a local one."""
    try:
        import ray
    except ImportError as error:
        raise missing_package("--executor ray", "ray", "ray") from error
    ray.init(log_to_driver=False, ignore_reinit_error=True)
    cluster = config["cluster"]
    try:
        for number, stage in enumerate(stages):
            tasks = RayTasks(
                list(stage.blocks),
                stage.tasks,
                workers or -1,
                logging_dir=_stage_folder(output, number, stage),
                cpus_per_task=cluster["cpus_per_task"],
                mem_per_cpu_gb=cluster["mem_per_cpu_gb"],
            )
            if left := tasks.get_incomplete_ranks():
                log(f"stage {number + 1} of {len(stages)}: {stage.name}, {_counted(len(left))}")
                tasks.run()
            if left := tasks.get_incomplete_ranks():
                raise UserError(f"{stage.name}: {_error_of(tasks.logging_dir, left[0])}")
            _require_documents(stage, config, output)
    finally:
        ray.shutdown()


def _error_of(folder: DataFolder, rank: int) -> str:
    name = f"errors/{rank:05d}"
    if not folder.isfile(name):
        return f"task {rank} did not finish; see {folder.resolve_paths('logs')}"
    with folder.open(name, "r") as file:
        return file.read()


def _submit(
    stages: Sequence[CorpusStage], config: Config, output: str, workers: int, log: Log
) -> None:
    """Submit the stages to SLURM, as jobs that each wait for the previous one."""
    cluster, last = config["cluster"], None
    path = f'export PATH="{Path(sys.executable).parent}:$PATH"'
    for number, stage in enumerate(stages):
        last = SlurmPipelineExecutor(
            list(stage.blocks),
            stage.tasks,
            cluster["time"],
            cluster["partition"],
            cpus_per_task=cluster["cpus_per_task"],
            mem_per_cpu_gb=cluster["mem_per_cpu_gb"],
            workers=workers or -1,
            job_name=f"lm-corpus-{number + 1}",
            qos=cluster["qos"],
            env_command=cluster["env_command"] or path,
            logging_dir=_stage_folder(output, number, stage),
            depends=last,
        )
    assert last is not None
    try:
        last.run()
    except FileNotFoundError as error:
        raise UserError(f"--executor slurm: {error.filename} is not available here") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch failed with {error.returncode}; its output is above") from error
    log(f"submitted {len(stages)} jobs, the last is {last.job_id}; the card will be in {output}")


def _counted(n: int) -> str:
    return "1 task" if n == 1 else f"{n:,} tasks"
