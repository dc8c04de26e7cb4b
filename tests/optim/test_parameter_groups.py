"""Trained parameters, and their learning rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.config import default
from lm.config.registries import OPTIMIZERS
from lm.errors import UserError
from lm.models.parameter_groups import TrainableMask
from lm.models.variables import Kind, ParamInfo, Role, flat, nested
from lm.optim.further_optimizers import update_scales
from lm.optim.optimizers import ParamTable, make_optimizer

SHAPES = {
    "tokens/embedding": (6, 4),
    "embedding_norm/scale": (4,),
    "stack/layers/attention/query/kernel": (3, 4, 2, 2),
    "stack/layers/attention/query/bias": (3, 2, 2),
    "stack/layers/feed_forward/in/kernel": (3, 4, 5),
    "stack/final_norm/scale": (4,),
    "head/kernel": (4, 2),
}
ADAPTERS = {
    "lora/stack/layers/attention/query/kernel/a": (3, 4, 2),
    "lora/stack/layers/attention/query/kernel/b": (3, 2, 2, 2),
}


INFOS = {
    "tokens/embedding": ParamInfo(Role(Kind.EMBEDDING, part="input", inputs=1), ("vocab", "embed")),
    "embedding_norm/scale": ParamInfo(Role(Kind.NORM, part="input"), ("norm",)),
    "stack/layers/attention/query/kernel": ParamInfo(
        Role(Kind.MATRIX, inputs=1, outputs=2), ("layers", "embed", "heads", "head_dim")
    ),
    "stack/layers/attention/query/bias": ParamInfo(
        Role(Kind.BIAS, outputs=2), ("layers", "heads", "head_dim")
    ),
    "stack/layers/feed_forward/in/kernel": ParamInfo(
        Role(Kind.MATRIX, inputs=1), ("layers", "embed", "mlp")
    ),
    "stack/final_norm/scale": ParamInfo(Role(Kind.NORM), ("norm",)),
    "head/kernel": ParamInfo(Role(Kind.HEAD, part="output", inputs=1), ("embed", "vocab")),
    "lora/stack/layers/attention/query/kernel/a": ParamInfo(
        Role(Kind.LOW_RANK, inputs=1), ("layers", "embed", "lora_rank")
    ),
    "lora/stack/layers/attention/query/kernel/b": ParamInfo(
        Role(Kind.LOW_RANK, inputs=1, outputs=2), ("layers", "lora_rank", "heads", "head_dim")
    ),
}


def draw(seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return nested({path: np.float32(rng.normal(size=shape)) for path, shape in shapes.items()})


def loss(params, x):
    """Return a loss whose gradient is nonzero and distinct for every element."""
    return sum(jnp.sum(jnp.sin(leaf + x)) for leaf in jax.tree.leaves(params))


def train(trainable, optimizer, params, steps=2):
    """(parameters after some steps, the last gradient, the last optimizer state)."""
    trained, frozen = trainable.split(params)
    state = optimizer.init(trained)

    @jax.jit
    def step(trained, state, x):
        grads = jax.grad(lambda trained: loss(trainable.join(trained, frozen), x))(trained)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, grads

    for t in range(steps):
        trained, state, grads = step(trained, state, 0.1 * t)
    after, grads = jax.device_get((trainable.join(trained, frozen), grads))
    return flat(after), flat(grads), state


def options_of(name="adamw", **changes):
    options = default().optimizer
    options.name, options.learning_rate, options.decay = name, 0.1, "all"
    options.update(changes)
    return options


def optimizer_of(options, trainable):
    return make_optimizer(
        options, lambda t: options.learning_rate, ParamTable(INFOS, options.decay), trainable
    )


FROZEN = {  # pattern → of each path, what is frozen: True or the layers
    "tokens": {"tokens/embedding": True},
    "^embedding": {"embedding_norm/scale": True},
    "bias$, head": {"stack/layers/attention/query/bias": True, "head/kernel": True},
    "layers/[01]/": {path: [0, 1] for path in SHAPES if "layers" in path},
    "layers/.*/attention/query": {path: True for path in SHAPES if "attention" in path},
    "layers/2/attention/.*kernel": {"stack/layers/attention/query/kernel": [2]},
    "stack/layers": {path: True for path in SHAPES if "layers" in path},
}


@pytest.mark.parametrize(
    ("freeze", "name"),
    [(freeze, "adamw") for freeze in FROZEN] + [("layers/[01]/", name) for name in OPTIMIZERS],
)
def test_frozen_parameters_stay_bitwise_equal_and_the_rest_trains(freeze, name):
    params, trainable = draw(), TrainableMask(freeze)
    after, _, _ = train(trainable, optimizer_of(options_of(name), trainable), params)
    for path, before in flat(params).items():
        frozen = FROZEN[freeze].get(path, [])
        kept = (before == after[path]).reshape(len(before), -1)
        if frozen is True:
            assert before.tobytes() == after[path].tobytes(), path
        else:
            assert kept[frozen].all(), path
            assert not kept[[i for i in range(len(before)) if i not in frozen]].any(), path


def test_frozen_parameters_have_no_gradient_and_no_optimizer_state():
    params, trainable = draw(), TrainableMask("tokens,attention/query/kernel,layers/1/")
    _, grads, state = train(trainable, optimizer_of(options_of(), trainable), params)
    whole = {"tokens/embedding", "stack/layers/attention/query/kernel"}
    assert grads.keys() == SHAPES.keys() - whole
    assert not grads["stack/layers/feed_forward/in/kernel"][1].any()
    assert grads["stack/layers/feed_forward/in/kernel"][[0, 2]].all()
    sizes = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(sizes) == 2 * sum(np.prod(SHAPES[path]) for path in grads)


def test_unfrozen_parameters_train_as_without_the_frozen_ones():
    """Clipping by the global norm included."""
    params = draw()
    kept = {path: leaf for path, leaf in flat(params).items() if "layers" not in path}
    options = options_of(clip_norm=0.5)
    trainable = TrainableMask("stack/layers")
    together, _, _ = train(trainable, optimizer_of(options, trainable), params)
    alone, _, _ = train(TrainableMask(), optimizer_of(options, TrainableMask()), nested(kept))
    for path, leaf in alone.items():
        np.testing.assert_allclose(together[path], leaf, rtol=1e-6, err_msg=path)


def test_lora_trains_only_its_factors_and_named_parameters():
    params = draw(shapes=SHAPES | ADAPTERS)
    for trainable, expected in (
        (TrainableMask(), {*ADAPTERS}),
        (TrainableMask(with_lora="head,bias"), {*ADAPTERS, "head/kernel", *_ending("bias")}),
        (TrainableMask("lora/.*/b$", "head"), {"head/kernel", *_ending("/a", ADAPTERS)}),
    ):
        trained, frozen = trainable.split(params)
        assert flat(trained).keys() == expected
        assert flat(trained).keys() | flat(frozen).keys() == SHAPES.keys() | ADAPTERS.keys()


def test_layers_beside_low_rank_parameters_train_alone():
    params = draw(shapes=SHAPES | ADAPTERS)
    trainable = TrainableMask(with_lora="layers/2/feed_forward")
    after, _, _ = train(trainable, optimizer_of(options_of(), trainable), params)
    path = "stack/layers/feed_forward/in/kernel"
    same = after[path] == flat(params)[path]
    assert same[:2].all()
    assert not same[2].any()


def _ending(end, shapes=SHAPES):
    return {path for path in shapes if path.endswith(end)}


@pytest.mark.parametrize(
    ("trainable", "words"),
    [
        (TrainableMask("head,tokenz"), "--config.optimizer.freeze: 'tokenz' matches no parameter"),
        (TrainableMask("layers/3/"), "--config.optimizer.freeze: 'layers/3/' matches no parameter"),
        (
            TrainableMask("head,(tokens"),
            r"--config.optimizer.freeze: '\(tokens' is not a valid regular",
        ),
        (TrainableMask("."), "leaves no parameter to train"),
        (TrainableMask("", "headd"), "--config.lora.train: 'headd' matches no parameter"),
    ],
)
def test_invalid_input_is_rejected(trainable, words):
    with pytest.raises(UserError, match=words):
        trainable.split(draw(shapes=SHAPES | ADAPTERS))


def test_layers_learn_at_the_rates_of_beit():
    """Its get_num_layer_for_vit: embeddings 0, block i i + 1, the rest n + 1; scale
    decay^(n + 1 - that). Worked for n = 3 and 0.5."""
    found = flat(update_scales(0.5, TrainableMask(), draw(), INFOS))
    expected = {path: [0.125, 0.25, 0.5] for path in SHAPES} | {
        "tokens/embedding": 0.0625,
        "embedding_norm/scale": 0.0625,
        "stack/final_norm/scale": 1,
        "head/kernel": 1,
    }
    assert {path: np.squeeze(scale).tolist() for path, scale in found.items()} == expected


def test_rates_of_patterns_multiply():
    rates = r"attention=>0.5, layers/[0\,2]/.*kernel=>2, head=>0"
    found = flat(update_scales(1.0, TrainableMask("layers/1/"), draw(), INFOS, rates))
    expected = dict.fromkeys(SHAPES, 1) | {
        "stack/layers/attention/query/kernel": [1, 0, 1],
        "stack/layers/attention/query/bias": [0.5, 0, 0.5],
        "stack/layers/feed_forward/in/kernel": [2, 0, 2],
        "head/kernel": 0,
    }
    assert {path: np.squeeze(scale).tolist() for path, scale in found.items()} == expected
    with pytest.raises(UserError, match="'hed' matches no parameter"):
        optimizer_of(options_of(rates="hed=>2"), None).init(draw())


def test_frozen_layers_and_zero_rates_leave_averages_unchanged():
    """They stay bitwise equal, although averages are sums; trained parameters move."""
    trainable, params = TrainableMask("layers/1/"), draw()
    options = options_of(ema=0.9, rates="head=>0")
    trained, _ = trainable.split(params)
    optimizer = optimizer_of(options, trainable)
    state, update = optimizer.init(trained), jax.jit(optimizer.update)
    for t in range(3):
        updates, state = update(draw(t + 1), state, trained)
        trained = optax.apply_updates(trained, updates)
    before, after = flat(params), flat(trained)
    kernel = "stack/layers/feed_forward/in/kernel"
    np.testing.assert_array_equal(after[kernel][1], before[kernel][1])
    np.testing.assert_array_equal(after["head/kernel"], before["head/kernel"])
    assert (after[kernel][0] != before[kernel][0]).all()


def test_layers_of_several_segments_keep_their_numbers():
    """Two scanned layers and four in a period of two after them; three that are not stacked."""
    shapes = {
        "decoder/layers_0/attention/kernel": (2, 4, 4),
        "decoder/layers_2/0_of_2/attention/kernel": (2, 4, 4),
        "decoder/layers_2/1_of_2/attention/kernel": (2, 4, 4),
        **{f"encoder/layers/{i}/attention/kernel": (4, 4) for i in range(3)},
    }
    params = draw(shapes=shapes)
    groups = TrainableMask(freeze="layers/2/").groups(params)
    frozen = {path: (~group).tolist() for path, group in groups.items()}
    assert frozen == {
        "decoder/layers_0/attention/kernel": [False, False],
        "decoder/layers_2/0_of_2/attention/kernel": [True, False],
        "decoder/layers_2/1_of_2/attention/kernel": [False, False],
        "encoder/layers/0/attention/kernel": False,
        "encoder/layers/1/attention/kernel": False,
        "encoder/layers/2/attention/kernel": True,
    }
    infos = {
        path: ParamInfo(
            Role(Kind.MATRIX, inputs=1), ("layers",) * (len(shape) - 2) + ("embed",) * 2
        )
        for path, shape in shapes.items()
    }
    scales = flat(update_scales(0.5, TrainableMask(), params, infos))
    depths = {path: np.ravel(-np.log2(scale)).tolist() for path, scale in scales.items()}
    assert depths == {
        "decoder/layers_0/attention/kernel": [6, 5],
        "decoder/layers_2/0_of_2/attention/kernel": [4, 2],
        "decoder/layers_2/1_of_2/attention/kernel": [3, 1],
        "encoder/layers/0/attention/kernel": [3],
        "encoder/layers/1/attention/kernel": [2],
        "encoder/layers/2/attention/kernel": [1],
    }


def test_layers_that_alternate_keep_their_numbers():
    """Two stacks of four layers, the odd ones of which are of another kind."""
    shapes = {
        f"{stack}/layers/{kind}/feed_forward/in/kernel": (2, 4, 5)
        for stack in ("encoder", "decoder")
        for kind in ("0_of_2", "1_of_2")
    }
    params = draw(shapes=shapes)
    infos = dict.fromkeys(shapes, INFOS["stack/layers/feed_forward/in/kernel"])
    scales = flat(update_scales(0.5, TrainableMask(), params, infos))
    for path, scale in scales.items():
        expected = [1 / 16, 1 / 4] if "0_of_2" in path else [1 / 8, 1 / 2]
        assert np.squeeze(scale).tolist() == expected, path
    groups = TrainableMask("encoder/layers/3/,decoder/layers/[02]/").groups(params)
    assert {path: group.tolist() for path, group in groups.items()} == {
        "encoder/layers/0_of_2/feed_forward/in/kernel": [True, True],
        "encoder/layers/1_of_2/feed_forward/in/kernel": [True, False],
        "decoder/layers/0_of_2/feed_forward/in/kernel": [False, False],
        "decoder/layers/1_of_2/feed_forward/in/kernel": [True, True],
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layer_decay_scales_whole_updates(name):
    params = draw()
    moved = {}
    for decay in (1.0, 0.5):
        options = options_of(name, layer_decay=decay, weight_decay=0.3)
        after, _, _ = train(
            TrainableMask(), optimizer_of(options, TrainableMask()), params, steps=1
        )
        moved[decay] = {path: after[path] - leaf for path, leaf in flat(params).items()}
    scales = flat(update_scales(0.5, TrainableMask(), params, INFOS))
    for path, update in moved[1.0].items():
        np.testing.assert_allclose(moved[0.5][path], update * scales[path], atol=1e-6, err_msg=path)
