"""Train every experiment at small size, kill and resume it, also on another mesh, and use it.

    python scripts/check_families_train.py [--only REGEX] [--output TABLE.md] [--workdir DIR]

Each variant of each experiment file is shrunk (`scripts/shrink.py`), and identical ones are tried
once. A variant trains for 6 steps on a mesh of two devices, and again with SIGKILL before the
second checkpoint. The script prints and writes a table with the columns

    train   the losses are finite
    resume  the killed run, continued on its mesh, has bitwise the same losses and evaluations
    mesh    so has, within 1e-5, a copy continued on another mesh
    eval    `lm eval` of the run gives its last evaluation
    decode  `lm generate`, with a cache, writes the most likely tokens of the full forward pass
    export  after `lm export` and `lm import`, parameters and configuration are the same

A dash means that the model does not decode, or that transformers has no such class. The exit code
is 1 if a cell has anything other than "yes" or a dash. A variant takes about half a minute on one
core.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parent))
from proof_of_value import ENVIRONMENT, LIBRARIES, write_data
from shrink import shrunk

from lm.config import load_config
from lm.config.experiment_file import variants_in

ROOT = Path(__file__).absolute().parents[1]
STEPS = 6
COLUMNS = ("train", "resume", "mesh", "eval", "decode", "export")
EXPERIMENT = """
import json
from lm.config import default

def get_config():
    config = default()
    config.update(json.loads({values!r}))
    return config
"""


def meshes(config: ConfigDict) -> tuple[str, str]:
    """Return the meshes on which a configuration is trained and resumed."""
    other = "data=2 expert=2" if config.model.n_experts else "tensor=2"
    return "fsdp=2", other


def chosen_variants(only: str, data: Path) -> dict[str, ConfigDict]:
    """Return the small configurations of the variants whose name matches, by FILE:VARIANT.

    Only the first of several that differ just in the learning rate is included.
    """
    found: dict[str, ConfigDict] = {}
    alike = set()
    for spec in variants_in(ROOT / "experiments"):
        config = shrunk(load_config(spec), data, STEPS)
        structure = config.copy_and_resolve_references()
        structure.optimizer.learning_rate = 1.0
        if structure.to_json() not in alike:
            alike.add(structure.to_json())
            found[Path(spec).name] = config
    return {name: config for name, config in found.items() if re.search(only, name)}


# --- processes


def run_apart(function: Callable[..., Any], *args: Any) -> tuple[int, str, Any]:
    """Call a function in a fork of this process; return its exit code, its output and its result.

    Importing the libraries takes longer than most of the calls.
    """
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    with tempfile.TemporaryFile() as log:

        def call() -> None:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sending.send(function(*args))

        process = context.Process(target=call)
        process.start()
        sending.close()
        try:
            result = receiving.recv()
        except EOFError:
            result = None
        process.join()
        log.seek(0)
        return process.exitcode or 0, log.read().decode(errors="replace"), result


def train(experiment: Path, workdir: Path, mesh: str, kill: bool = False) -> None:
    """Train a run on a mesh; with `kill`, end by SIGKILL when the last checkpoint would start."""
    from lm.runs.checkpoints import Checkpoints

    save = Checkpoints.save

    def save_or_die(self: Any, step: int, *args: Any, **options: Any) -> None:
        if step == STEPS:
            self.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, step, *args, **options)

    if kill:
        Checkpoints.save = save_or_die  # type: ignore[method-assign]
    words = ["train", "--config", str(experiment), "--workdir", str(workdir)]
    sizes = {"data": "1"} | dict(size.split("=") for size in mesh.split())
    words += ["--cpu_devices", str(math.prod(map(int, sizes.values())))]
    words += ["--config.parallel.preset=custom"]
    sys.argv = ["lm", *words, *(f"--config.parallel.mesh.{a}={n}" for a, n in sizes.items())]
    try:
        runpy.run_module("lm", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"exit code {end.code}") from end


def lm(*words: object) -> tuple[int, str]:
    """Run a verb in this process; return its exit code, and what it printed."""
    from lm.cli import main

    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main([*map(str, words)])
    return code, out.getvalue() if code == 0 else errors.getvalue()


# --- what is compared


def metrics(workdir: Path) -> dict[tuple[int, str], float]:
    """Return losses and evaluations of a run, by step and name."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    found = {}
    for row in rows:
        for name, value in row.items():
            if name == "loss" or (name.startswith("eval/") and name.endswith("/loss")):
                found[row["step"], name] = value
    return found


def difference(found: dict[Any, float], expected: dict[Any, float], rtol: float) -> str:
    """Return "yes" if all metrics are equal within `rtol`, else the first that is not."""
    if found.keys() != expected.keys():
        return f"other rows: {sorted(found.keys() ^ expected.keys())}"
    for key, value in expected.items():
        if not (found[key] == value or abs(found[key] - value) <= rtol * abs(value)):
            return f"{key}: {found[key]!r}, not {value!r}"
    return "yes"


def evaluated(workdir: Path) -> str:
    """Compare `lm eval` with the last evaluation of the training."""
    code, printed = lm("eval", "--workdir", workdir, "--json")
    if code:
        return printed
    name = "eval/validation/loss"
    loss, expected = json.loads(printed)[name], metrics(workdir)[STEPS, name]
    return "yes" if abs(loss - expected) <= 1e-5 * expected else f"{loss}, not {expected}"


def decoded(workdir: Path) -> str:
    """Compare greedy decoding with the full forward pass, with perturbed parameters."""
    import jax

    from lm.api import load_run
    from lm.data.audio.audio_inputs import recording_sources
    from lm.data.special_tokens import special_tokens
    from lm.decoding.batch import search_batches
    from lm.decoding.beam import BeamOptions
    from lm.decoding.controls import Controls
    from lm.decoding.prompts import generates_text, input_role, is_encoder_decoder, source_ids
    from lm.decoding.sampling import Sampling, sample_steps
    from lm.models.variables import flat, nested

    run = load_run(workdir)
    if not generates_text(run.experiment):
        return "–"
    hears = input_role(run.model) == "audio"
    folder = Path(run.config.data.source.partition(":")[2]).parent
    prompt = folder / "0.wav" if hears else "one two"
    code, printed = lm("generate", "--workdir", workdir, "--prompt", prompt, "--greedy")
    if code:
        return printed
    rng = np.random.default_rng(0)
    params = {  # at the beginning a token hardly depends on the ones before it
        path: x + np.float32(rng.normal(0, 0.3, x.shape)) if x.dtype == np.float32 else x
        for path, x in flat(jax.device_get(run.params)).items()
    }
    params = jax.device_put(nested(params), jax.tree.map(lambda x: x.sharding, run.params))
    run = replace(run, params=params)
    experiment, own = run.decoding
    ids = [int(i) for i in run.tokenizer.encode("one two three")]
    if is_encoder_decoder(run.model):
        source: Any = source_ids(run.tokenizer, "one two three", run.config.data.sequence_length)
        if hears:
            source = np.asarray(recording_sources([str(prompt)], run.config.data)[0])
        options = BeamOptions.from_config(run.config, run.tokenizer)
        ((best, *_),) = search_batches(experiment, own, run.tokenizer, [source], options)
        written = [int(i) for i in best.tokens]
        start = [special_tokens(run.tokenizer).bos]
        logits = run.logits([source], [start + written])[0]
    else:
        steps = sample_steps(experiment.model, own, [ids], 8, Sampling(0.0), 0, Controls())
        written, start = [int(step[0]) for step in steps], ids
        logits = run.logits([ids + written])[0]
    logits = np.asarray(logits)[len(start) - 1 : -1]
    behind = logits.max(-1) - logits[np.arange(len(written)), written]
    if not written or behind.max() > 1e-4 * np.abs(logits).max():
        return f"wrote {written}, which are {behind} behind the best"
    return "yes"


def exported(workdir: Path, folder: Path) -> str:
    """Export a run and import it again; compare configuration and parameters."""
    from lm.interop.family import comparable_config
    from lm.interop.folder_heads import TASK_MODULES
    from lm.models.variables import flat
    from lm.qk_clip import is_largest_logits
    from lm.runs.checkpoints import ignore_line
    from lm.runs.saved_params import restore_run

    code, printed = lm("export", "--workdir", workdir, "--to", folder / "hf")
    if code:
        reason = printed.splitlines()[-1].removeprefix("error: ")
        return f"– {reason}" if reason.startswith("no Hugging Face architecture") else printed
    code, printed = lm("import", "--from", folder / "hf", "--workdir", folder / "again")
    if code:
        return printed
    (before, own, _), (after, other, _) = (
        restore_run(run, {}, ignore_line, any_batch=True, heads_optional=True)
        for run in (workdir, folder / "again")
    )
    family = before.config.model.family
    configs = [
        comparable_config(run.model.config, family, bool({*own} & TASK_MODULES))
        for run in (before, after)
    ]
    wrong = [
        f"{name}={configs[1].get(name)!r}, not {value!r}"
        for name, value in configs[0].items()
        if configs[1].get(name) != value
    ]
    own, other = (
        {path: x for path, x in flat(params).items() if not is_largest_logits(path)}
        for params in (own, other)
    )
    heads = {p for p, i in before.param_infos.items() if i.role.part in ("pretraining", "task")}
    missing = own.keys() - other.keys() - heads  # heads of objectives that their classes lack
    wrong += [f"without {p}" for p in sorted(missing) if not p.startswith("generator/")]
    wrong += [f"new {path}" for path in sorted(other.keys() - own.keys())]
    wrong += [
        f"other values of {path}"
        for path in sorted(own.keys() & other.keys())
        if own[path].shape != other[path].shape or not np.array_equal(own[path], other[path])
    ]
    return "; ".join(wrong) or "yes"


def used(workdir: Path, folder: Path) -> dict[str, str]:
    """Return the columns of the checks after training."""
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    found = {}
    for name, check in {
        "eval": lambda: evaluated(workdir),
        "decode": lambda: decoded(workdir),
        "export": lambda: exported(workdir, folder),
    }.items():
        try:
            found[name] = check()
        except Exception:
            found[name] = traceback.format_exc()
    return found


def check(name: str, config: ConfigDict, folder: Path) -> dict[str, str]:
    """Return the columns of a variant."""
    file = folder / "experiment.py"
    file.write_text(EXPERIMENT.format(values=config.to_json()))
    first, second = meshes(config)
    found: dict[str, str] = {}
    code, log, _ = run_apart(train, file, folder / "calm", first)
    if code:
        return {"train": log[-3000:]}
    calm = metrics(folder / "calm")
    finite = all(math.isfinite(value) for value in calm.values())
    found["train"] = "yes" if finite and len(calm) == STEPS + 2 else str(calm)
    code, log, _ = run_apart(train, file, folder / "resume", first, True)
    if code != -signal.SIGKILL or (folder / "resume" / "checkpoints" / str(STEPS)).exists():
        return found | {"resume": f"exit code {code}, not killed: {log[-3000:]}"}
    shutil.copytree(folder / "resume", folder / "mesh")
    for column, mesh, rtol in (("resume", first, 0.0), ("mesh", second, 1e-5)):
        code, log, _ = run_apart(train, file, folder / column, mesh)
        same = f"continuing from step {STEPS // 2}" in log
        found[column] = (
            log[-3000:] if code or not same else difference(metrics(folder / column), calm, rtol)
        )
    code, log, result = run_apart(used, folder / "calm", folder)
    return found | (result or {"eval": log[-3000:]})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="of FILE.py:VARIANT")
    parser.add_argument("--output", type=Path, metavar="TABLE.md")
    parser.add_argument("--workdir", default=tempfile.gettempdir())
    args = parser.parse_args()
    top = Path(tempfile.mkdtemp(prefix="check_families_", dir=args.workdir))
    write_data(top / "data")
    os.environ |= ENVIRONMENT
    os.environ["LM_CACHE_DIR"] = str(top / "stores")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(top / "xla"))
    os.environ.setdefault("PJRT_NPROC", "16")  # see lm/cli/__init__.py
    for library in LIBRARIES:
        importlib.import_module(library)
    rows = [f"| variant | {' | '.join(COLUMNS)} |", f"|---{'|---' * len(COLUMNS)}|"]
    wrong = 0
    for name, config in chosen_variants(args.only, top / "data").items():
        folder = top / re.sub(r"\W", "_", name)
        folder.mkdir()
        found = check(name, config, folder)
        cells = [found.get(column, "not tried") for column in COLUMNS]
        bad = [cell for cell in cells if cell != "yes" and not cell.startswith("–")]
        wrong += bool(bad)
        print(f"{name}: {', '.join(f'{c} {found.get(c)}' for c in COLUMNS)}", flush=True)
        rows.append(f"| {name} | {' | '.join(cell.split(chr(10))[-1][:90] for cell in cells)} |")
        if args.output:
            args.output.write_text("\n".join(rows) + "\n")
        if not bad:
            shutil.rmtree(folder)
    print("\n".join(rows))
    print(f"{wrong} of {len(rows) - 2} variants with a fault; {top}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
