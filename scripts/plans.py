"""Plan every experiment of at most 10B parameters where it fits; write experiments/PLANS.md.

    python scripts/plans.py [PATTERN …]

Each plan is immediately saved as a line of experiments/results/plans/plans.jsonl, so an interrupted
run continues, and a configuration is planned only once. Patterns such as 'llama*' select the
FILE.py:VARIANT to plan; 'none' only writes the table. TPUs need the extra "tpu", GPUs "cuda12";
targets that cannot be planned on this machine are reported and left out. A plan takes about a
minute on an idle core.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from lm.accounting.flops import tokens_per_row
from lm.accounting.parameter_counts import count_parameters
from lm.config import default, flatten, load_config
from lm.config.experiment_file import variants_in
from lm.errors import UserError
from lm.experiment import Experiment, build, resolve_parallelism
from lm.hardware import CHIPS
from lm.parallel.mesh import axis_sizes
from lm.tools.planning.cost_model import CostModel, Settings
from lm.tools.planning.mesh_search import overridden
from lm.tools.planning.plan import make_plan
from lm.tools.planning.topologies import topology

Plan = dict[str, Any]
Kept = dict[tuple[str, str], Plan]  # by digest of the configuration and place

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "experiments" / "results" / "plans" / "plans.jsonl"
LARGEST = 10e9
SHARDED_FROM = 300e6  # parameters from which the mesh is fsdp rather than data
SMALL = ("v5e:1x1", "v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16")
LARGE = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v5p:8x8x8")
ROOM = 0.8  # of the memory, for the likely bytes of the cost model
MOST_TOKENS = 32_768  # a device

PLANNED = (
    *("model.", "objective.", "parallel.", "lora.", "optimizer.name", "optimizer.freeze"),
    *("data.batch_size", "data.sequence_length", "data.target_length", "data.labels"),
    *("train.microbatches", "train.remat", "train.loss_chunk"),
)

HEADER = """# Plans

The output of `lm plan` for every experiment of at most 10B parameters, on the first of these
topologies on which it fits with its own batch size, with at most {tokens:,} tokens per device if
the batch is divisible: {topologies}; for some experiments also on other chips, or with the stated
number of microbatches. Layers are in a loop.

Written by `python scripts/plans.py`. Figures are per device and step, computed by the compilers
({compilers}) from the published rates of the chips; none was measured. The bound is the longest
of compute, memory and network time; a real step is slower. Compile times are wall-clock times,
many on a busy machine; a quiet core takes about a minute. Memory is the sum of arguments and
temporaries in the compiler's analysis; on TPUs the peak is lower, and `lm plan` prints it too.
Plans below an MFU of 40 % are of narrow models, which are bound by memory, or of large ones with
a paper's batch of few tokens per chip, which are bound by the network.

"""
COLUMNS = (
    "experiment",
    "parameters",
    "topology",
    "mesh",
    "tokens per device",
    "memory",
    "FLOPs / model's",
    "attention",
    "bound",
    "by",
    "tokens/s",
    "MFU",
    "compiled in",
)
LEFT = ("experiment", "topology", "mesh", "attention", "by")


@dataclass(frozen=True)
class Place:
    """Target of a plan: topology, number of slices, and overrides."""

    name: str
    slices: int = 1
    overrides: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        parts = dict(self.overrides).get("train.microbatches", 1)
        name = f"{self.slices} × {self.name}" if self.slices > 1 else self.name
        return f"{name}, in {parts} parts" if parts > 1 else name


DATA, FSDP = (("parallel.preset", "data"),), (("parallel.preset", "fsdp"),)
JOINED = (
    ("parallel.mesh.slice", 2),
    ("parallel.mesh.data", 1),
    ("parallel.mesh.fsdp", -1),
)
# Microbatches of the smallest published model of each newer family, on 64 v5p and 64 H100.
PARTS = {
    "bart.py:base": 5,
    "deberta.py:base": 4,
    "deepseek.py:v2-lite": 18,
    "electra.py:base": 1,
    "flan_t5.py:small": 1,
    "gpt_oss.py:20b": 4,
    "granite.py:3-2b": 4,
    "llama4.py:scout": 8,
    "mamba.py:130m": 1,
    "mamba.py:bamba-9b": 4,
    "modernbert.py:base": 4,
    "mt5.py:small": 2,
    "olmo.py:2-1b": 4,
    "olmo.py:e-1b-7b": 4,
    "phi.py:3-mini": 4,
    "qwen_moe.py:3-30b-a3b": 4,
    "smollm.py:2-135m": 1,
    "stablelm.py:3b": 4,
    "ul2.py:20b": 1,
    "whisper.py:tiny": 1,
}
# Further rows of experiments.
OTHERS: dict[str, tuple[Place, ...]] = {
    name: tuple(
        Place(chips, overrides=(*FSDP, ("train.microbatches", parts), ("eval.batch_size", 64)))
        for chips in ("v5p:4x4x4", "h100:8x8")
    )
    for name, parts in PARTS.items()
} | {
    "llama.py:3.2-1b": (
        Place("v4:4x4x4", overrides=FSDP),
        Place("v6e:16x16", overrides=FSDP),
        Place("7x:4x4x4", overrides=FSDP),
        Place("v5e:16x16", 2, JOINED),
    ),
    "gpt2.py:1558m": (
        Place("v4:4x4x4", overrides=(*FSDP, ("train.microbatches", 8))),
        Place("h100:1x8", overrides=(*FSDP, ("train.microbatches", 16))),
    ),
    "gpt2.py:124m": (Place("a100:1x8", overrides=(("train.microbatches", 8),)),),
    # Without microbatches these fit nowhere.
    "gpt2.py:nanogpt": (Place("v5e:4x4", overrides=(*DATA, ("train.microbatches", 5))),),
    "roberta.py:base": (Place("v5e:16x16", overrides=(*DATA, ("train.microbatches", 8))),),
    "roberta.py:large": (Place("v5e:16x16", overrides=(*FSDP, ("train.microbatches", 8))),),
}


def config_of(name: str) -> ConfigDict:
    """Return the configuration of FILE.py:VARIANT for planning."""
    config = load_config(str(ROOT / "experiments" / name))
    if not config.model.vocab_size and config.data.tokenizer != "byte":
        # The size of the tokenizer once it is trained; its corpus need not be here.
        config.model.vocab_size = config.data.tokenizer_vocab_size
    config.train.scan_unroll = 1  # small models, unrolled for CPUs, would compile for minutes
    return config


@cache
def cost_model(name: str) -> CostModel:
    """Build the cost model of an experiment on v5e."""
    simple = {"parallel.preset": "data", "model.dtype": "bfloat16", "model.attention": "xla"}
    return CostModel(build(overridden(config_of(name), simple), jax.devices()[:1]), CHIPS["v5e"])


def parameters(name: str) -> int:
    return count_parameters(cost_model(name).experiment)["total"]


def places(name: str) -> Iterator[Place]:
    """Yield topologies that divide the batch and probably have enough memory, smallest first."""
    if not importlib.util.find_spec("libtpu"):
        return
    costs = cost_model(name)
    config = costs.experiment.config
    preset = "fsdp" if parameters(name) >= SHARDED_FROM else "data"
    settings = Settings(config.train.remat, config.train.microbatches, config.parallel.sequence)
    found = []
    for described in LARGE if preset == "fsdp" else SMALL:
        place = topology(described)
        sizes = axis_sizes(preset, {}, len(place.devices))
        try:
            schedule, _ = resolve_parallelism(config, "tpu", sizes)
            estimate = costs.estimate(sizes, schedule, settings)
        except UserError:  # the batch or a parameter is not divisible
            continue
        if estimate.likely < ROOM * (place.chip.memory or 0):
            tokens = tokens_of(costs.experiment) // len(place.devices)
            found.append((tokens, Place(described, overrides=(("parallel.preset", preset),))))
    few = [place for tokens, place in found if tokens <= MOST_TOKENS]
    yield from few or [place for _, place in found]


def tokens_of(experiment: Experiment) -> int:
    """Return the tokens per step, of sources and targets."""
    return experiment.config.data.batch_size * tokens_per_row(experiment)


def plan(name: str, place: Place) -> Plan:
    """Plan an experiment; return the output of `lm plan --json` without its long entries."""
    config = overridden(config_of(name), dict(place.overrides))
    made = make_plan(config, topology(place.name, place.slices), place.slices).as_json()
    jax.clear_caches()
    return {key: made[key] for key in made if key not in ("config", "largest")}


def key_of(name: str) -> str:
    """Return a digest of the keys that affect a plan and that the experiment sets."""
    usual = dict(flatten(default()))
    values = {
        path: value
        for path, value in flatten(config_of(name))
        if usual[path] != value and path.startswith(PLANNED) and not path.startswith("model.init")
    }
    return hashlib.sha256(json.dumps([name, values]).encode()).hexdigest()[:16]


def kept() -> Kept:
    """Read the saved plans."""
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    entries = map(json.loads, lines)
    return {(entry["key"], entry["place"]): entry["plan"] for entry in entries}


def planned(name: str, place: Place, before: Kept, chosen: bool) -> Plan | None:
    """Return the saved plan; if the experiment is `chosen`, plan now and save."""
    key = key_of(name), str(place)
    if key not in before and chosen:
        print(f"{name} on {place}", file=sys.stderr, flush=True)
        try:
            before[key] = plan(name, place)
        except (UserError, RuntimeError, NotImplementedError) as error:
            print(f"  {str(error)[:300]}", file=sys.stderr, flush=True)
            return None
        entry = {"name": name, "key": key[0], "place": key[1], "plan": before[key]}
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        with KEPT.open("a") as file:
            file.write(json.dumps(entry) + "\n")
    return before.get(key)


def rows_of(name: str, before: Kept, chosen: bool) -> Iterator[str]:
    """Yield a row for the first topology on which the experiment fits, and for those of OTHERS."""
    others = OTHERS.get(name, ())
    own = [(key, found) for key, found in before.items() if key[0] == key_of(name)]
    fitting = [
        (place, found)
        for (_, place), found in own
        if found["fits"] and place not in map(str, others)
    ]
    large = name in PARTS or parameters(name) > LARGEST
    if not own and (not chosen or (large and not others)):
        return
    if not fitting and chosen and not large:
        tried = ((place, planned(name, place, before, chosen)) for place in places(name))
        fits = ((str(place), found) for place, found in tried if found and found["fits"])
        fitting = list(islice(fits, 1))
    for place, found in fitting[:1]:
        yield row(name, place, found)
    for place in others:
        if found := planned(name, place, before, chosen):
            yield row(name, str(place), found)


def row(name: str, place: str, found: Plan) -> str:
    mesh = ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items()) or "one device"
    tokens, flops = tokens_of(cost_model(name).experiment), found["flops"]
    cells = (
        name,
        f"{found['parameters']:,}",
        place,
        mesh,
        f"{tokens // found['devices']:,}",
        f"{found['memory']['total'] / 1e9:.2f} GB" + ("" if found["fits"] else ", too much"),
        f"{flops['compiled'] / flops['model']:.2f}" if flops["compiled"] else "–",
        found["attention_kernel"] or "–",
        f"{1e3 * found['time']['bound']:,.2f} ms" if found["time"] else "–",
        found["bottleneck"] or "–",
        f"{found['tokens_per_second']:,.0f}" if found["time"] else "–",
        f"{found['mfu']:.1%}" if found["time"] else "–",
        f"{found['compile_seconds']:.0f} s",
    )
    return line(cells)


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def compilers() -> str:
    from importlib.metadata import distributions

    names = ("jax", "libtpu", "jax-cuda12-plugin")
    found = {d.name: d.version for d in distributions() if d.name in names}
    return ", ".join(f"{name} {found[name]}" for name in names if name in found)


def write(rows: list[str], without: list[str]) -> None:
    names = ", ".join(dict.fromkeys((*SMALL, *LARGE)))
    text = HEADER.format(topologies=names, tokens=MOST_TOKENS, compilers=compilers())
    text += line(COLUMNS) + line("---" if c in LEFT else "--:" for c in COLUMNS) + "".join(rows)
    text += (
        f"\nAbove 10B parameters, or not planned yet: {', '.join(without)}.\n" if without else ""
    )
    (ROOT / "experiments" / "PLANS.md").write_text(text)


def main(patterns: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    before, rows, without = kept(), [], []
    for spec in variants_in(ROOT / "experiments"):
        name = Path(spec).name
        chosen = not patterns or any(fnmatch(name, pattern) for pattern in patterns)
        found = list(rows_of(name, before, chosen))
        rows += found
        without += [] if found else [name]
    write(rows, without)


if __name__ == "__main__":
    main(sys.argv[1:])
