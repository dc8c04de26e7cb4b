"""Golden shardings of every experiment's parameters on a mesh of both parameter axes.

`golden/shardings.txt` lists, of the first variant of each file in `experiments/`, the axes of the
mesh that divide each dimension of each parameter; the first dimension of a stack is its layers.
After a change that is meant: `python tests/tools/planning/test_shardings.py` writes the file again.
"""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
from axes import axes_of

from lm.config import load_config, set_value
from lm.config.experiment_file import variants_in
from lm.experiment import build
from lm.models.variables import flat

GOLDEN = Path(__file__).with_name("golden") / "shardings.txt"
EXPERIMENTS = Path(__file__).parents[3] / "experiments"
CHANGES = {
    "parallel.mesh.data": 1,
    "parallel.mesh.fsdp": 2,
    "parallel.mesh.tensor": 2,
    "data.batch_size": 8,
    "eval.batch_size": 8,
    "train.microbatches": 1,
}


def firsts() -> list[str]:
    """Return FILE.py:VARIANT of each file's first variant."""
    by_file: dict[str, str] = {}
    for spec in variants_in(EXPERIMENTS):
        by_file.setdefault(Path(spec).name.partition(":")[0], str(spec))
    return sorted(by_file.values())


def described(spec: str) -> str:
    """Return a line for each parameter: shape and mesh axes, "-" for an unsharded dimension."""
    config = load_config(spec)
    for path, value in CHANGES.items():
        set_value(config, path, value)
    if not config.model.vocab_size and config.data.tokenizer != "byte":
        config.model.vocab_size = config.data.tokenizer_vocab_size  # its corpus is not here
    experiment = build(config, jax.devices()[:4])
    shapes, shardings = (
        flat(tree) for tree in (experiment.param_shapes, experiment.state_sharding.params)
    )
    lines = [Path(spec).name]
    for path in sorted(shapes):
        size = " × ".join(map(str, shapes[path].shape))
        lines.append(f"  {path:60} {size:22} {axes_of(shardings[path])}")
    return "\n".join(line.rstrip() for line in lines) + "\n"


@pytest.mark.parametrize("spec", firsts(), ids=lambda spec: Path(spec).name)
def test_parameter_shardings_are_unchanged(spec):
    by_name = {text.partition("\n")[0]: text for text in GOLDEN.read_text().split("\n\n")}
    assert described(spec).strip() == by_name[Path(spec).name].strip()


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    GOLDEN.write_text("\n".join(map(described, firsts())))
