"""Plan every experiment of at most 10B parameters where it fits; writes experiments/PLANS.md.

    python scripts/plans.py [PATTERN …]

Of the topologies below the first is taken on which the global batch divides and the step fits. A
plan that was made before, by the same configuration, is not made again (.cache/plans); patterns
such as 'llama*' choose variants. Needs the extra "tpu"; about a minute a variant on a quiet core.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "plans"
TOPOLOGIES = ("v5e:1x1", "v5e:2x2", "v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v5p:8x8x8")
LARGEST = 10e9
SHARDED_FROM = 300e6  # parameters from which the mesh is fsdp rather than data
HEADER = """# Plans

What `lm plan` says of every experiment of at most 10B parameters, on the first of the topologies
{topologies} on which it fits with its own batch. Written by
`python scripts/plans.py`; every figure is of one device and one step, by the TPU's compiler and the
published rates of its chips, none was measured. The bound is the longest of compute, memory and
network, each alone; a real step is slower.

"""
COLUMNS = (
    "experiment",
    "parameters",
    "topology",
    "mesh",
    "memory",
    "FLOPs / model's",
    "bound",
    "by",
    "tokens/s",
    "MFU",
    "compiled in",
)
ALIGNED = ("---", "--:", "---", "---", "--:", "--:", "--:", "---", "--:", "--:", "--:")


def variants() -> Iterator[tuple[str, str]]:
    """File name and variant of every experiment."""
    for file in sorted((ROOT / "experiments").glob("*.py")):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield from ((file.name, variant) for variant in module.VARIANTS)


def lm(*words: str) -> dict[str, Any]:
    """The JSON that an `lm` command prints."""
    command = [sys.executable, "-m", "lm", *words, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


def plan(name: str) -> dict[str, Any] | None:
    """The plan of experiments/NAME on the first topology where it fits; None above 10B."""
    config = ["--config", f"experiments/{name}"]
    values = lm("config", *config)
    if not values["model.vocab_size"] and values["data.tokenizer"] != "byte":
        # What the tokenizer would have if it were made; its corpus need not be here.
        config.append(f"--config.model.vocab_size={values['data.tokenizer_vocab_size']}")
    key = hashlib.sha256(json.dumps([values, TOPOLOGIES]).encode()).hexdigest()[:16]
    cached = CACHE / f"{name.replace(':', '-')}-{key}.json"
    if cached.exists():
        return json.loads(cached.read_text())
    total = lm("params", *config)["total"]
    if total > LARGEST:
        return None
    mesh = f"--config.parallel.preset={'fsdp' if total >= SHARDED_FROM else 'data'}"
    for topology in TOPOLOGIES:
        n = prod(map(int, topology.partition(":")[2].split("x")))
        parts = n * values["train.microbatches"]
        if values["data.batch_size"] % parts or (n == 1 and total >= SHARDED_FROM):
            continue
        found = lm("plan", *config, mesh, "--topology", topology)
        if found["fits"]:
            CACHE.mkdir(parents=True, exist_ok=True)
            cached.write_text(json.dumps(found))
            return found
    raise RuntimeError("fits on none of the topologies")


def row(name: str, found: dict[str, Any]) -> str:
    mesh = ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items()) or "one device"
    flops = found["flops"]
    cells = (
        name,
        f"{found['parameters']:,}",
        found["topology"],
        mesh,
        f"{found['memory']['total'] / 1e9:.2f} GB",
        f"{flops['compiled'] / flops['model']:.2f}",
        f"{1e3 * found['time']['bound']:,.2f} ms",
        found["bottleneck"],
        f"{found['tokens_per_second']:,.0f}",
        f"{found['mfu']:.1%}",
        f"{found['compile_seconds']:.0f} s",
    )
    return line(cells)


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def main(patterns: list[str]) -> None:
    rows, problems = [], []
    for file, variant in variants():
        name = f"{file}:{variant}"
        if patterns and not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        print(name, file=sys.stderr, flush=True)
        try:
            found = plan(name)
        except RuntimeError as error:
            problems.append(f"- {name}: {error}\n")
            continue
        if found:
            rows.append(row(name, found))
    text = HEADER.format(topologies=", ".join(TOPOLOGIES))
    text += line(COLUMNS) + line(ALIGNED) + "".join(rows)
    if problems:
        text += "\nNot planned:\n\n" + "".join(problems)
    (ROOT / "experiments" / "PLANS.md").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
