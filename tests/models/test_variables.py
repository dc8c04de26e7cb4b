"""Roles of parameters in known architectures, and in a model with different names."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import default
from lm.errors import UserError
from lm.experiment import build_untraced
from lm.models.lora import add_lora
from lm.models.parameter_groups import TrainableMask
from lm.models.variables import Kind, Param, Role, flat, nested, param, param_infos
from lm.optim.further_optimizers import update_scales
from lm.optim.optimizers import ParamTable, make_optimizer

MATRIX, NORM, BIAS = Kind.MATRIX, Kind.NORM, Kind.BIAS


def roles_of(config):
    infos = build_untraced(config, jax.devices()[:1]).param_infos
    return {path: (i.role.kind, i.role.stream, i.role.part) for path, i in infos.items()}, infos


def of_block(path, stream, sublayers):
    """The parameters of a block without biases (T5): kernels and norms."""
    found = {}
    for sublayer, kernels in sublayers.items():
        for kernel in kernels:
            at = (
                "source" if sublayer == "cross_attention" and kernel in ("key", "value") else stream
            )
            found[f"{path}/{sublayer}/{kernel}/kernel"] = (MATRIX, at, "layers")
        found[f"{path}/{sublayer}_norm/scale"] = (NORM, stream, "layers")
    return found


def test_roles_of_t5(make_kind):
    """An encoder reads the source; keys and values of cross-attention are made of it."""
    found, infos = roles_of(make_kind("span_corruption encoder_decoder"))
    attention, wide = ("query", "key", "value", "out"), ("gate", "in", "out")
    both = {"attention": attention, "feed_forward": wide}
    expected = {
        "tokens/embedding": (Kind.EMBEDDING, "predicted", "input"),
        "head/kernel": (Kind.HEAD, "predicted", "output"),
        "encoder/relative_bias/embedding": (Kind.POSITION_BIAS, "source", "input"),
        "decoder/relative_bias/embedding": (Kind.POSITION_BIAS, "target", "input"),
        "encoder/final_norm/scale": (NORM, "source", "layers"),
        "decoder/final_norm/scale": (NORM, "target", "layers"),
        **of_block("encoder/layers", "source", both),
        **of_block("decoder/layers", "target", both | {"cross_attention": attention}),
    }
    assert found == expected
    out = infos["decoder/layers/attention/out/kernel"]  # [layers, heads, head_dim, embed]
    assert (out.n_stacked, out.role.inputs, out.role.outputs) == (1, 2, 1)
    assert not infos["tokens/embedding"].role.tied


def test_roles_of_bert(make_kind):
    """Its encoder and pooler are the model; masked words and next sentences are pretraining."""
    found, infos = roles_of(make_kind("masked encoder"))
    outside = {path: role for path, role in found.items() if "layers/" not in path}
    assert outside == {
        "tokens/embedding": (Kind.EMBEDDING, "predicted", "input"),
        "positions/embedding": (Kind.EMBEDDING, "target", "input"),
        "types/embedding": (Kind.EMBEDDING, "target", "input"),
        "embedding_norm/scale": (NORM, "target", "input"),
        "embedding_norm/bias": (BIAS, "target", "input"),
        "transform/kernel": (MATRIX, "predicted", "pretraining"),
        "transform/bias": (BIAS, "predicted", "pretraining"),
        "transform_norm/scale": (NORM, "target", "pretraining"),
        "transform_norm/bias": (BIAS, "target", "pretraining"),
        "logit_bias/bias": (BIAS, "target", "pretraining"),
        "pooler/kernel": (MATRIX, "text", "task"),
        "pooler/bias": (BIAS, "text", "task"),
        "sentence_head/kernel": (Kind.HEAD, "text", "pretraining"),
        "sentence_head/bias": (BIAS, "text", "pretraining"),
    }
    assert infos["tokens/embedding"].role.tied


def test_roles_of_experts(make_kind):
    """In every second block experts [layers, experts, inputs, outputs] and their router."""
    _, infos = roles_of(make_kind("span_corruption encoder_decoder experts"))
    experts = {path for path, info in infos.items() if info.role.expert}
    assert {path.rpartition("feed_forward/")[2] for path in experts} == {
        f"experts/{name}/{kind}" for name in ("in", "out") for kind in ("kernel", "bias")
    }
    for path in experts:
        assert "1_of_2" in path
        assert infos[path].n_stacked == 2
    routers = [path for path, info in infos.items() if info.role.kind == Kind.ROUTER]
    assert {path.partition("/")[2] for path in routers} == {
        "layers/1_of_2/feed_forward/router/kernel"
    }


def test_roles_of_an_lstm_encoder_decoder(make_kind):
    found, _ = roles_of(make_kind("seq2seq lstm_encoder_decoder"))
    for path, (kind, stream, part) in found.items():
        if path.startswith(("encoder/", "decoder/")):
            assert kind == (MATRIX if path.endswith("kernel") else BIAS)
            assert stream == ("source" if path.startswith("encoder") else "target")
            assert part == "body"


# --- a model with names of its own


class Odd(nn.Module):
    """Parameters whose names say nothing."""

    @nn.compact
    def __call__(self, x):
        for name, axes, role in PARAMETERS:
            draw = nn.initializers.normal(1.0)
            x += param(self, name, draw, (4,) * len(axes), axes, role).sum()
        return x


PARAMETERS = [
    ("alpha", ("vocab", "embed"), Role(Kind.EMBEDDING, part="input", inputs=1)),
    ("kernel", ("norm",), Role(Kind.NORM, part="input")),
    ("beta", ("embed", "mlp"), Role(Kind.MATRIX, inputs=1)),
    ("head", ("heads", "head_dim", "embed"), Role(Kind.MATRIX, inputs=2)),
    ("embedding", ("mlp",), Role(Kind.BIAS)),
    ("layers", ("embed", "classes"), Role(Kind.HEAD, part="task", inputs=1)),
]


@pytest.fixture(scope="module")
def odd():
    boxed = Odd().init(jax.random.key(0), jnp.zeros(()))["params"]
    return boxed, nn.meta.unbox(boxed), param_infos(boxed)


def updates_of(odd, **changes):
    _, params, infos = odd
    options = default().optimizer
    ratio, slope = changes.pop("width_ratio", 1.0), changes.pop("slope", 1.0)
    options.update(changes | {"clip_norm": 0.0})
    table = ParamTable(infos, options.decay, ratio)
    optimizer = make_optimizer(options, lambda t: 1.0, table)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: np.float32(slope * rng.normal(size=x.shape)), params)
    return flat(jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]), flat(params)


@pytest.mark.parametrize(
    ("decay", "decaying"),
    [
        ("matrices", {"alpha", "beta", "head", "layers"}),
        ("kernels", {"beta", "head", "layers"}),
        ("all", {name for name, _, _ in PARAMETERS}),
    ],
)
def test_decay_follows_the_role(odd, decay, decaying):
    updates, params = updates_of(odd, name="adamw", decay=decay, weight_decay=0.5, slope=0.0)
    for path, update in updates.items():
        expected = -0.5 * params[path] if path in decaying else 0 * params[path]
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=path)


def test_mup_scales_hidden_matrices(odd):
    one, _ = updates_of(odd, name="adamw", weight_decay=0.0)
    wide, _ = updates_of(odd, name="adamw", weight_decay=0.0, width_ratio=4.0)
    scaled = {path for path in one if not np.allclose(one[path], wide[path])}
    assert scaled == {"beta", "head"}
    for path in scaled:
        np.testing.assert_allclose(4 * wide[path], one[path], rtol=1e-5)


def test_muon_orthogonalizes_matrices_of_layers(odd):
    updates, _ = updates_of(odd, name="muon", weight_decay=0.0)
    for path, shape in {"beta": (4, 4), "head": (16, 4), "alpha": (4, 4), "layers": (4, 4)}.items():
        values = np.linalg.svd(np.reshape(updates[path], shape), compute_uv=False)
        assert (values.min() > 0.6 * values.max()) == (path in ("beta", "head")), path


def test_low_rank_adaptation_targets_kernels(odd):
    boxed, *_ = odd
    options = default().lora
    options.update(rank=2, targets="head,beta,layers")
    lora = flat(add_lora(boxed, options, jax.random.key(1))["lora"])
    assert {path: box.value.shape for path, box in lora.items()} == {
        "beta/a": (4, 2),
        "beta/b": (2, 4),
        "head/a": (4, 4, 2),
        "head/b": (2, 4),
        "layers/a": (4, 2),
        "layers/b": (2, 4),
    }
    options.targets = "embedding"
    with pytest.raises(UserError, match="'embedding' matches no kernel"):
        add_lora(boxed, options, jax.random.key(1))


def test_layer_decay_is_lowest_for_the_input(odd):
    _, params, infos = odd
    params = {name: leaf for name, leaf in params.items() if name != "layers"}
    scales = flat(update_scales(0.5, TrainableMask(), nested(params), infos))
    assert {path for path, scale in scales.items() if scale.squeeze() == 0.5} == {"alpha", "kernel"}


# --- a parameter without a role


def test_parameter_without_a_role_is_an_error():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.param("weight", nn.initializers.ones, ())

    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.ones, ("embed",))
            return x * self.param("weight", init, (3,)).sum()

    class Forgot(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * param(self, "weight", nn.initializers.ones, (3,), ("embed",), None).sum()

    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x):
            role = Role(Kind.MATRIX, inputs=1)
            return x * param(self, "weight", nn.initializers.ones, (3,), ("embed",), role).sum()

    for module in (Plain, Named):
        variables = module().init(jax.random.key(0), jnp.ones(()))
        with pytest.raises(UserError, match="parameter weight has no role: create it by"):
            param_infos(variables["params"])
    with pytest.raises(ValueError, match="parameter weight has no role"):
        Forgot().init(jax.random.key(0), jnp.ones(()))
    with pytest.raises(ValueError, match="parameter weight: shape"):
        Wrong().init(jax.random.key(0), jnp.ones(()))


def test_stacking_adds_an_axis_and_keeps_the_role():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            role = Role(Kind.MATRIX, inputs=1)
            init = nn.initializers.normal()
            return x @ param(self, "weight", init, (3, 3), ("embed", "mlp"), role), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            run = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=5,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return run(name="layers")(x, None)[0]

    boxed = jax.eval_shape(Stack().init, jax.random.key(0), jnp.ones((2, 3)))["params"]
    box = boxed["layers"]["weight"]
    assert isinstance(box, Param)
    assert box.value.shape == (5, 3, 3)
    info = param_infos(boxed)["layers/weight"]
    assert info.axes == ("layers", "embed", "mlp")
    assert info.n_stacked == 1
