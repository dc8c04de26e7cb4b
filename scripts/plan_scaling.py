"""Plan a model on 8 to 4,096 chips, with constant batch per chip; write results/plans/.

    python scripts/plan_scaling.py

With parameters sharded over all chips (FSDP), the memory of parameters and optimizer state should
fall as 1/n. Activations and gathered weights should stay constant, and so should the bytes of an
all-gather or of the gradient reduction, of which a chip sends (n - 1)/n (Rajbhandari et al. 2020,
§7). The last line says whether the compiled programs agree. A size is planned only once. Needs the
extras "tpu" and "report".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax

from lm.config import load_config, set_value
from lm.tools.planning.plan import make_plan
from lm.tools.planning.topologies import topology

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "results" / "plans"
TOPOLOGIES = {8: "v5p:2x2x2", 64: "v5p:4x4x4", 512: "v5p:8x8x8", 4096: "v5p:16x16x16"}
# As wide as Llama-2-7B, so that 4,096 chips divide it; shallow, so that it compiles in seconds.
MODEL = {
    "model.n_layers": 2,
    "model.d_ff": 4096,
    "model.n_heads": 8,
    "model.n_kv_heads": 8,
    "model.head_dim": 128,
    "model.vocab_size": 4096,
    "data.sequence_length": 1024,
    "train.loss_chunk": 0,
    "parallel.preset": "fsdp",
}
KINDS = ("all-gather", "reduce-scatter", "all-reduce")
ROWS = 4096  # of a matrix, sharded over the chips
TILE = 8  # rows of a tile of float32
CLOSE = 0.01  # largest relative error of the arguments
FLAT = 0.1  # largest relative variation of what should be constant, from 64 chips on


def plan(chips: int) -> dict[str, Any]:
    """Return the bytes that a chip stores and sends."""
    kept = FOLDER / "scaling.jsonl"
    lines = kept.read_text().splitlines() if kept.exists() else []
    for entry in map(json.loads, lines):
        if entry["chips"] == chips:
            return entry
    print(TOPOLOGIES[chips], file=sys.stderr, flush=True)
    config = load_config(str(ROOT / "experiments" / "llama.py:2-7b"))
    for path, value in {**MODEL, "data.batch_size": chips}.items():
        set_value(config, path, value)
    made = make_plan(config, topology(TOPOLOGIES[chips]))
    entry = {
        "chips": chips,
        "arguments": made.memory.arguments,
        "temporaries": made.memory.temporaries,
        **{kind: sum(c.bytes for c in made.collectives if c.kind == kind) for kind in KINDS},
        "compile_seconds": round(made.compile_seconds, 1),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    with kept.open("a") as file:
        file.write(json.dumps(entry) + "\n")
    return entry


def spread(values: list[int]) -> float:
    """Return the largest difference relative to the largest value."""
    return (max(values) - min(values)) / max(max(values), 1)


def verdict(plans: list[dict[str, Any]]) -> str:
    """Compare the plans with theory; an AssertionError names a disagreement."""
    first, second, *later = plans
    # Arguments are sharded / n + replicated (norms, the batch): two plans determine both parts.
    share, less = 1 / first["chips"], 1 / second["chips"]
    sharded = (first["arguments"] - second["arguments"]) / (share - less)
    whole = first["arguments"] - sharded * share
    for plan in later:
        expected = sharded / plan["chips"] + whole
        error = plan["arguments"] / expected - 1
        assert abs(error) < CLOSE, f"{plan['chips']} chips: arguments are {error:+.0%} of 1/n's"
    # A shard of fewer rows than a tile is padded: reported, but not compared with theory.
    tiled = [p["temporaries"] for p in plans[1:] if ROWS / p["chips"] >= TILE]
    flat = {
        "temporaries": tiled,
        "communication": [sum(p[kind] for kind in KINDS) for p in plans[1:]],
    }
    for name, values in flat.items():
        assert spread(values) < FLAT, f"{name} vary by {spread(values):.0%}: {values}"
    shown = ", ".join(f"{name} within {spread(values):.1%}" for name, values in flat.items())
    last = plans[-1]
    return (
        f"as in theory: {sharded / 1e9:.3f} GB of parameters and moments over n chips, "
        f"{whole / 1e6:.2f} MB on each; from {second['chips']} chips on {shown}; temporaries at "
        f"{last['chips']:,}, where a shard has {ROWS // last['chips']} row: "
        f"{last['temporaries'] / tiled[-1] - 1:+.0%}"
    )


def draw(plans: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    chips = [p["chips"] for p in plans]
    for axes, title, names in zip(
        figure.subplots(1, 2),
        ("memory a chip (GB)", "communication a chip a step (GB)"),
        (("arguments", "temporaries"), KINDS),
        strict=True,
    ):
        for name in names:
            axes.plot(chips, [p[name] / 1e9 for p in plans], marker="o", label=name)
        axes.set(xscale="log", xlabel="chips", title=title, ylim=(0, None))
        axes.set_xticks(chips, [f"{n:,}" for n in chips])
        axes.legend(frameon=False)
    figure.savefig(FOLDER / "scaling.png", dpi=120)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    plans = [plan(chips) for chips in TOPOLOGIES]
    draw(plans)
    print(verdict(plans))


if __name__ == "__main__":
    main()
