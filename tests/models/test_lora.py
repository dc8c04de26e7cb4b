"""Low-rank adaptation against its definition, W + alpha/rank · A B, a layer at a time."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from lm.config import default
from lm.errors import UserError
from lm.models.lora import SCALES, adapted_params, add_lora, merge_lora
from lm.models.variables import Kind, Param, Role, flat, nested

# path → (shape, logical names, number of input dimensions)
KERNELS = {
    "head/kernel": ((8, 5), ("embed", "vocab"), 1),
    "stack/layers/attention/query/kernel": (
        (3, 8, 2, 4),
        ("layers", "embed", "heads", "head_dim"),
        1,
    ),
    "stack/layers/attention/value/kernel": (
        (3, 8, 1, 4),
        ("layers", "embed", "kv_heads", "head_dim"),
        1,
    ),
    "stack/layers/attention/out/kernel": (
        (3, 2, 4, 8),
        ("layers", "heads", "head_dim", "embed"),
        2,
    ),
    "stack/layers/feed_forward/in/kernel": ((3, 8, 12), ("layers", "embed", "mlp"), 1),
}
RANK = 2


def boxed(value, names, n_inputs):
    n_stacked = sum(name in ("layers", "experts") for name in names)
    kind = Kind.HEAD if "vocab" in names else Kind.MATRIX
    n_outputs = len(names) - n_stacked - n_inputs
    return Param(value, names, role=Role(kind, inputs=n_inputs, outputs=n_outputs))


def base():
    rng = np.random.default_rng(0)
    boxes = {
        path: boxed(np.float32(rng.normal(size=shape)), names, n_inputs)
        for path, (shape, names, n_inputs) in KERNELS.items()
    }
    names = ("layers", "heads", "head_dim")
    bias = Param(np.ones((3, 2, 4), np.float32), names, role=Role(Kind.BIAS, outputs=2))
    return nested(boxes | {"stack/layers/attention/query/bias": bias})


def options_of(targets="kernel", rank=RANK):
    options = default().lora
    options.update(rank=rank, targets=targets)
    return options


def adapted(targets="kernel", rank=RANK):
    return add_lora(base(), options_of(targets, rank), jax.random.key(1))


def test_int8_base_is_within_half_a_step_of_its_scale():
    options = options_of("query,head")
    options.base, options.train = "int8", "layers/1/feed_forward/in"
    boxes = flat(add_lora(base(), options, jax.random.key(1)))
    scales = {path for path in boxes if path.startswith(SCALES)}
    matrices = {path for path in KERNELS if "attention" in path}  # no head, nothing that trains
    assert scales == {f"{SCALES}/{path}" for path in matrices}
    assert boxes[f"{SCALES}/stack/layers/attention/out/kernel"].names == (
        *("layers", "one", "one", "embed"),
    )
    params = nested(nn.meta.unbox(boxes))
    merged, before = flat(merge_lora(params, 16.0)), flat(nn.meta.unbox(base()))
    for path, (shape, _, n_inputs) in KERNELS.items():
        if path not in matrices:
            np.testing.assert_array_equal(merged[path], before[path])
            continue
        values, scale = boxes[path].value, boxes[f"{SCALES}/{path}"].value
        assert values.dtype == np.int8
        largest = abs(before[path]).max(tuple(range(1, 1 + n_inputs)), keepdims=True)
        np.testing.assert_allclose(scale, largest / 127, rtol=1e-6)
        error = np.broadcast_to(0.501 * scale, shape)
        assert (abs(merged[path] - before[path]) <= error).all()


def test_layers_read_what_is_merged():
    """With int8 kernels the model gets boxes, which are what merging would have made of them."""
    options = options_of("query")
    options.base = "int8"
    params = nn.meta.unbox(add_lora(base(), options, jax.random.key(1)))
    factors = params["lora"]["stack"]["layers"]["attention"]["query"]["kernel"]
    factors["b"] = np.ones_like(factors["b"])
    boxes = adapted_params(params, 6.0)
    merged = flat(merge_lora(params, 6.0))
    unboxed = flat(nn.meta.unbox(boxes))
    assert unboxed.keys() == merged.keys()
    for path, kernel in merged.items():
        np.testing.assert_allclose(unboxed[path], kernel, rtol=1e-6)
    path = "stack/layers/attention/query/kernel"
    one_layer = jax.tree.map(lambda x: x[1], flat(boxes)[path])
    np.testing.assert_allclose(one_layer.unbox(), merged[path][1], rtol=1e-6)


def test_fresh_adaptation_changes_nothing():
    params = nn.meta.unbox(adapted())
    merged = flat(merge_lora(params, 16.0))
    assert merged.keys() == flat(base()).keys()
    for path, leaf in flat(nn.meta.unbox(base())).items():
        np.testing.assert_array_equal(merged[path], leaf, err_msg=path)


def test_merging_is_the_definition_for_every_layer():
    params = flat(nn.meta.unbox(adapted()))
    rng = np.random.default_rng(1)
    params |= {  # b is zero when it is fresh
        path: np.float32(rng.normal(size=x.shape)) for path, x in params.items() if "lora/" in path
    }
    merged = flat(jax.jit(merge_lora)(nested(params), 6.0))
    for path, (shape, names, n_inputs) in KERNELS.items():
        layers = range(3) if "layers" in names else [()]
        outputs = int(np.prod(shape[n_inputs + ("layers" in names) :]))
        for layer in layers:
            w, a, b, found = (
                np.asarray(x[layer], np.float64)
                for x in (
                    params[path],
                    params[f"lora/{path}/a"],
                    params[f"lora/{path}/b"],
                    merged[path],
                )
            )
            delta = a.reshape(-1, RANK) @ b.reshape(RANK, outputs)
            np.testing.assert_allclose(found, w + 6 / RANK * delta.reshape(w.shape), atol=1e-5)
    path = "stack/layers/attention/query/bias"
    np.testing.assert_array_equal(merged[path], params[path])


def test_shapes_and_names_follow_the_kernel():
    lora = flat(adapted()["lora"])
    found = {path: (box.value.shape, box.names) for path, box in lora.items()}
    out, query = "stack/layers/attention/out/kernel", "stack/layers/attention/query/kernel"
    assert found[f"{out}/a"] == ((3, 2, 4, RANK), ("layers", "heads", "head_dim", "lora_rank"))
    assert found[f"{out}/b"] == ((3, RANK, 8), ("layers", "lora_rank", "embed"))
    assert found[f"{query}/a"] == ((3, 8, RANK), ("layers", "embed", "lora_rank"))
    assert found[f"{query}/b"] == ((3, RANK, 2, 4), ("layers", "lora_rank", "heads", "head_dim"))
    assert found["head/kernel/a"] == ((8, RANK), ("embed", "lora_rank"))


def test_every_expert_is_adapted_by_itself():
    names = ("layers", "experts", "embed", "mlp")
    kernel = np.float32(np.random.default_rng(0).normal(size=(3, 4, 8, 12)))
    params = nested({"stack/layers/experts/in/kernel": boxed(kernel, names, 1)})
    params = add_lora(params, options_of(), jax.random.key(1))
    a, b = (flat(params["lora"])[f"stack/layers/experts/in/kernel/{x}"] for x in "ab")
    assert (a.value.shape, a.names) == ((3, 4, 8, RANK), (*names[:3], "lora_rank"))
    assert (b.value.shape, b.names) == ((3, 4, RANK, 12), ("layers", "experts", "lora_rank", "mlp"))
    plain = nn.meta.unbox(params)
    b = plain["lora"]["stack"]["layers"]["experts"]["in"]["kernel"]["b"] = np.ones_like(b.value)
    merged = flat(merge_lora(plain, 16.0))["stack/layers/experts/in/kernel"]
    expected = kernel + 16 / RANK * np.einsum("nedr,nerf->nedf", a.value, b)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-5)


def test_first_factor_is_drawn_as_in_the_authors_code():
    """kaiming_uniform_(A, a=sqrt(5)): uniform in ± 1/sqrt(inputs); B is zero."""
    lora = flat(nn.meta.unbox(adapted(rank=64))["lora"])
    for path, (shape, names, n_inputs) in KERNELS.items():
        first = int("layers" in names)
        bound = np.prod(shape[first : first + n_inputs]) ** -0.5
        a = np.asarray(lora[f"{path}/a"])
        assert 0.97 * bound < abs(a).max() <= bound, path
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.1), path
        assert not lora[f"{path}/b"].any()
    assert (a[0] != a[1]).all()


def test_targets_choose_the_kernels():
    targets = "attention/(query|value)/kernel, ^head"
    found = {path.rpartition("/")[0] for path in flat(adapted(targets)["lora"])}
    assert found == {
        "stack/layers/attention/query/kernel",
        "stack/layers/attention/value/kernel",
        "head/kernel",
    }


@pytest.mark.parametrize(
    ("targets", "words"),
    [("query,wide", "'wide' matches no kernel"), ("bias", "no kernel")],
)
def test_targets_that_are_rejected(targets, words):
    with pytest.raises(UserError, match=words):
        adapted(targets)
