"""State spaces and hybrids on meshes, and several texts packed into a row."""

import jax
import numpy as np
import pytest
from test_meshes import batches, experiment_on, first_state, losses

from lm.errors import UserError

MAMBA = {
    "model__mixer": "mamba2", "model__positions": "none", "model__ssm_heads": 4,
    "model__ssm_head_dim": 8, "model__ssm_state": 6, "model__ssm_groups": 2, "model__ssm_chunk": 6,
    "model__feed_forward": False,
}  # fmt: skip
DELTA = MAMBA | {"model__mixer": "gated_delta"}
HYBRID = MAMBA | {"model__attention_layers": (1,), "model__feed_forward": True}
MESHES = {
    "fsdp=2,tensor=2": ({"fsdp": 2, "tensor": 2}, MAMBA),
    "tensor=4": ({"data": 2, "tensor": 4}, HYBRID),  # more devices than groups
    "stage=2": ({"stage": 2, "data": 2}, MAMBA),
    "delta, stage=2,tensor=2": (
        {"stage": 2, "tensor": 2, "data": 2},
        DELTA | {"model__attention_layers": (1, 3), "model__n_layers": 4},
    ),
    "delta, fsdp=2,tensor=4": (
        {"fsdp": 2, "tensor": 4},
        DELTA
        | {"model__attention_layers": (1,), "model__attention_gate": True}
        | {"model__feed_forward": True},
    ),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_equal_those_of_one_device(mesh):
    sizes, values = MESHES[mesh]
    single = experiment_on({}, **values)
    start = first_state(single)
    expected = losses(single, 5, start)
    np.testing.assert_allclose(
        losses(experiment_on(sizes, **values), 5, start), expected, rtol=1e-5
    )


@pytest.mark.parametrize("values", [MAMBA, HYBRID, DELTA])
def test_packed_texts_do_not_see_each_other(values):
    """The second text of a row gives the same logits whatever the first one is."""
    experiment = experiment_on({}, **values)
    params = experiment.init_state().params
    batch = {name: x[0] for name, x in batches(experiment, 1).items()}
    run = jax.jit(experiment.model.apply)

    def logits(inputs):
        return run({"params": params}, inputs, batch["positions"], batch["segment_ids"])

    found, changed = logits(batch["inputs"]), logits(batch["inputs"].at[:, :8].add(1) % 66)
    assert np.abs(found[:, :8] - changed[:, :8]).max() > 1e-3
    # Decays between tokens are differences of sums from the start of a chunk.
    np.testing.assert_allclose(found[:, 8:], changed[:, 8:], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        (
            {"context": 2},
            {},
            r"mesh\.context=2 is not supported with --config\.model\.mixer=mamba2",
        ),
        (
            {"context": 2},
            DELTA,
            r"context=2 is not supported with --config\.model\.mixer=gated_delta",
        ),
        ({"tensor": 8}, {"model__n_heads": 8, "model__n_kv_heads": 8}, r"model\.ssm_heads=4 is"),
        ({"stage": 2}, HYBRID, r"stage=2 needs layers of one shape"),
        ({}, {"model__ssm_groups": 3}, r"ssm_heads=4 is not divisible by .*ssm_groups=3"),
        ({}, {"model__attention_layers": (2,)}, r"attention_layers=2: expected .* 0 to 1"),
        ({}, {"model__n_experts": 2}, r"n_experts=2 needs --config\.model\.feed_forward"),
        ({}, {"model__mixer": "attention"} | {"model__attention_layers": (0,)}, r"another"),
    ],
)
def test_conflicting_options_are_one_line_errors(mesh, changes, message):
    with pytest.raises(UserError, match=message):
        experiment_on(mesh, **MAMBA | changes)
