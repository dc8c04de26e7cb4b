"""Plan one model from 8 to 4,096 chips at a fixed batch a chip; writes experiments/plan_scaling.*.

    python scripts/plan_scaling.py

With parameters sharded over all chips (FSDP) theory says: parameters and optimizer state fall as
1/n; activations, gathered weights and the bytes of a gather or of the gradients' sum stay as they
are. Needs the extra "tpu" and matplotlib; a few minutes a size on a quiet core.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TOPOLOGIES = ("v5p:2x2x2", "v5p:4x4x4", "v5p:8x8x8", "v5p:16x16x16")
A_CHIP = 4
CONFIG = (
    *("--config", "experiments/llama.py:2-7b", "--config.parallel.preset=fsdp"),
    *("--config.data.sequence_length=2048", "--config.train.loss_chunk=1024"),
)


def n_chips(topology: str) -> int:
    x, y, z = topology.partition(":")[2].split("x")
    return int(x) * int(y) * int(z)


def plan(topology: str) -> dict[str, Any]:
    batch = f"--config.data.batch_size={A_CHIP * n_chips(topology)}"
    command = ["lm", "plan", *CONFIG, batch, "--topology", topology, "--json"]
    print(topology, file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def main() -> None:
    from matplotlib.figure import Figure

    chips = [n_chips(topology) for topology in TOPOLOGIES]
    plans = [plan(topology) for topology in TOPOLOGIES]
    memory = {
        "arguments": [p["memory"]["arguments"] / 1e9 for p in plans],
        "temporaries": [p["memory"]["temporaries"] / 1e9 for p in plans],
        "total": [p["memory"]["total"] / 1e9 for p in plans],
    }
    kinds = sorted({c["kind"] for p in plans for c in p["collectives"]})
    traffic = {
        kind: [sum(c["bytes"] for c in p["collectives"] if c["kind"] == kind) / 1e9 for p in plans]
        for kind in kinds
    }
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, title, lines in zip(
        figure.subplots(1, 2),
        ("memory a chip (GB)", "communication a chip a step (GB)"),
        (memory, traffic),
        strict=True,
    ):
        for name, values in lines.items():
            axes.plot(chips, values, marker="o", label=name)
        axes.set(xscale="log", xlabel="chips", title=title, ylim=(0, None))
        axes.set_xticks(chips, [f"{n:,}" for n in chips])
        axes.legend(frameon=False)
    folder = ROOT / "experiments"
    figure.savefig(folder / "plan_scaling.svg")
    data = {"chips": chips, "memory_gb": memory, "communication_gb": traffic}
    (folder / "plan_scaling.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
