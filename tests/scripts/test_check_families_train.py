"""Every variant of every experiment has a small configuration of its structure."""

from pathlib import Path

import pytest

from lm.config import load_config
from lm.config.experiment_file import variants_in
from lm.experiment import check

ROOT = Path(__file__).parents[2]
# What layers are made of; and sizes whose being more than 1 is structure, not size.
SAME = ("family", "mixer", "positions", "activation", "norm_placement", "residual", "rope_scaling")
PRESENT = ("n_experts", "window", "shared_expert_d_ff", "head_dim", "q_lora_rank", "embedding_size")


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        import check_families_train

        return check_families_train


def test_small_configuration_of_every_variant_trains_on_both_meshes(script):
    for spec in variants_in(ROOT / "experiments"):
        model, config = load_config(spec).model, script.shrunk(load_config(spec), Path("data"), 6)
        small = config.model
        assert small.d_model <= 64, spec
        assert small.n_layers <= 17, spec
        assert [small[name] for name in SAME] == [model[name] for name in SAME], spec
        assert [small[n] > 0 for n in PRESENT] == [model[n] > 0 for n in PRESENT], spec
        heads = [m.n_heads // (m.n_kv_heads or m.n_heads) > 1 for m in (small, model)]
        assert heads[0] == heads[1], spec
        for mesh in script.meshes(config):
            sizes = {axis: int(n) for axis, n in (size.split("=") for size in mesh.split())}
            config.parallel.mesh.update({"data": 1, "fsdp": 1, "tensor": 1, "expert": 1} | sizes)
            check(config, "cpu", 4 if "expert" in sizes else 2)


def test_metrics_that_differ_are_named(script):
    calm = {(1, "loss"): 4.0, (2, "loss"): 3.0}
    assert script.difference(dict(calm), calm, 0.0) == "yes"
    assert script.difference(calm | {(2, "loss"): 3.00001}, calm, 1e-5) == "yes"
    assert "(2, 'loss')" in script.difference(calm | {(2, "loss"): 3.00001}, calm, 0.0)
    assert "(2, 'loss')" in script.difference(calm | {(2, "loss"): float("nan")}, calm, 1e-5)
    assert "(3, 'loss')" in script.difference(calm | {(3, "loss"): 3.0}, calm, 1e-5)
