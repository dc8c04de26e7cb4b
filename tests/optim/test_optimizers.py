"""Updates against the papers' algorithms, written in numpy for one parameter at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from lm.config import default
from lm.config.registries import OPTIMIZERS
from lm.models.variables import Kind, ParamInfo, Role
from lm.optim.optimizers import ParamTable, make_optimizer

DECAY = 0.1
SHAPES = {
    "tokens": {"embedding": (6, 8)},
    "head": {"kernel": (8, 6)},
    "lora": {"head": {"kernel": {"a": (8, 2), "b": (2, 6)}}},
    "stack": {
        "final_norm": {"scale": (8,)},
        "layers": {
            "attention": {
                "query": {"kernel": (2, 8, 2, 3), "bias": (2, 2, 3)},
                "out": {"kernel": (2, 2, 3, 8)},
            },
            "attention_norm": {"scale": (2, 8), "bias": (2, 8)},
            "feed_forward": {"in": {"kernel": (2, 8, 12)}},
        },
    },
}


KERNEL = Role(Kind.MATRIX, inputs=1)
INFOS = {
    "tokens/embedding": ParamInfo(Role(Kind.EMBEDDING, part="input", inputs=1), ("vocab", "embed")),
    "head/kernel": ParamInfo(Role(Kind.HEAD, part="output", inputs=1), ("embed", "vocab")),
    "lora/head/kernel/a": ParamInfo(Role(Kind.LOW_RANK, inputs=1), ("embed", "lora_rank")),
    "lora/head/kernel/b": ParamInfo(Role(Kind.LOW_RANK, inputs=1), ("lora_rank", "vocab")),
    "stack/final_norm/scale": ParamInfo(Role(Kind.NORM), ("norm",)),
    "stack/layers/attention/query/kernel": ParamInfo(
        Role(Kind.MATRIX, inputs=1, outputs=2), ("layers", "embed", "heads", "head_dim")
    ),
    "stack/layers/attention/query/bias": ParamInfo(
        Role(Kind.BIAS, outputs=2), ("layers", "heads", "head_dim")
    ),
    "stack/layers/attention/out/kernel": ParamInfo(
        Role(Kind.MATRIX, inputs=2), ("layers", "heads", "head_dim", "embed")
    ),
    "stack/layers/attention_norm/scale": ParamInfo(Role(Kind.NORM), ("layers", "norm")),
    "stack/layers/attention_norm/bias": ParamInfo(Role(Kind.BIAS), ("layers", "norm")),
    "stack/layers/feed_forward/in/kernel": ParamInfo(KERNEL, ("layers", "embed", "mlp")),
    "stack/layers/feed_forward/experts/out/kernel": ParamInfo(
        KERNEL, ("layers", "experts", "mlp", "embed")
    ),
    "kernel": ParamInfo(KERNEL, ("embed", "mlp")),
}


def optimizer_of(options, schedule):
    return make_optimizer(options, schedule, ParamTable(INFOS, options.decay))


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.float32(scale * rng.normal(size=shape)),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def by_name(tree):
    return {
        "/".join(part.key for part in path): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def schedule(t):
    return 0.1 / (t + 1)


def options_of(name, **changes):
    options = default().optimizer
    options.name, options.clip_norm, options.weight_decay = name, 0.0, DECAY
    for path, value in changes.items():
        *sections, last = path.split("__")
        node = options
        for section in sections:
            node = node[section]
        node[last] = value
    return options


def run(options, gradients, schedule=schedule):
    """Parameters, by name, after a step for each gradient tree."""
    params = draw(0)
    optimizer = optimizer_of(options, schedule)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return by_name(params)


def reference(step, decays):
    """Parameters after three steps of `step(x, g, t, memory) -> update` with decoupled decay."""
    params = by_name(draw(0))
    memory = {name: {} for name in params}
    for t in range(3):
        for name, g in by_name(draw(t + 1)).items():
            x = params[name]
            decay = DECAY * x if decays(name) else 0
            params[name] = x - schedule(t) * (step(x, g, t + 1, memory[name]) + decay)
    return params


def is_matrix(name):
    return name.endswith(ENDINGS["matrices"])


def adam(b1, b2, eps, corrected=True):
    def step(x, g, t, memory):
        m = memory["m"] = b1 * memory.get("m", 0) + (1 - b1) * g
        v = memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * g**2
        t = t if corrected else np.inf
        return m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)

    return step


def sgd(momentum, nesterov):
    """Sutskever et al. 2013."""

    def step(x, g, t, memory):
        m = memory["m"] = momentum * memory.get("m", 0) + g
        return g + momentum * m if nesterov else m

    return step


def lion(b1, b2):
    """Chen et al. 2023, Algorithm 2."""

    def step(x, g, t, memory):
        m = memory.get("m", 0)
        memory["m"] = b2 * m + (1 - b2) * g
        return np.sign(b1 * m + (1 - b1) * g)

    return step


def adafactor(parameter_scale, clip=1.0, decay_rate=0.8):
    """Shazeer and Stern 2018, Algorithms 4 and 5, without momentum."""

    def rms(x):
        return np.sqrt((x**2).mean())

    def step(x, g, t, memory):
        b2 = 1 - t**-decay_rate
        squares = g**2 + 1e-30
        if x.ndim == 2:
            r = memory["r"] = b2 * memory.get("r", 0) + (1 - b2) * squares.sum(1)
            c = memory["c"] = b2 * memory.get("c", 0) + (1 - b2) * squares.sum(0)
            v = np.outer(r, c) / r.sum()
        else:
            v = memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * squares
        u = g / np.sqrt(v)
        u = u / max(1, rms(u) / clip)
        return u * max(1e-3, rms(x)) if parameter_scale else u

    return step


CASES = {
    "adamw": (options_of("adamw"), adam(0.9, 0.95, 1e-8)),
    "adamw of BERT's code": (
        options_of("adamw", adamw__bias_correction=False),
        adam(0.9, 0.95, 1e-8, corrected=False),
    ),
    "adamw, large eps": (
        options_of("adamw", adamw__b1=0.8, adamw__b2=0.99, adamw__eps=0.5),
        adam(0.8, 0.99, 0.5),
    ),
    "sgd": (options_of("sgd"), sgd(0.9, False)),
    "sgd nesterov": (options_of("sgd", sgd__nesterov=True), sgd(0.9, True)),
    "lion": (options_of("lion"), lion(0.9, 0.99)),
}


@pytest.mark.parametrize("case", CASES)
def test_three_steps_are_those_of_the_paper(case):
    options, step = CASES[case]
    found = run(options, [draw(t + 1) for t in range(3)])
    expected = reference(step, decays=is_matrix)
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("parameter_scale", [True, False])
def test_adafactor_is_that_of_the_paper(parameter_scale):
    options = options_of(
        "adafactor", adafactor__parameter_scale=parameter_scale, adafactor__min_dim=6
    )
    found = run(options, [draw(t + 1) for t in range(3)])
    expected = reference(adafactor(parameter_scale), decays=is_matrix)
    for name in ("tokens/embedding", "head/kernel", "stack/final_norm/scale"):
        np.testing.assert_allclose(found[name], expected[name], atol=2e-6, err_msg=name)


def test_adafactor_treats_every_layer_apart():
    options = options_of("adafactor", adafactor__min_dim=6)
    params, grads = draw(0), draw(1)
    kernel = params["stack"]["layers"]["feed_forward"]["in"]["kernel"]
    kernel[1] *= 10
    optimizer = optimizer_of(options, schedule)

    def update(params, grads):
        return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]

    together = update(params, grads)["stack"]["layers"]["feed_forward"]["in"]["kernel"]
    slope = grads["stack"]["layers"]["feed_forward"]["in"]["kernel"]
    for i in range(2):
        alone = update({"kernel": kernel[i]}, {"kernel": slope[i]})["kernel"]
        np.testing.assert_allclose(together[i], alone, rtol=1e-4)


ENDINGS = {
    "matrices": ("kernel", "embedding", "/a", "/b"),
    "kernels": ("kernel", "/a", "/b"),
    "all": ("kernel", "embedding", "bias", "scale", "/a", "/b"),
}


@pytest.mark.parametrize("decay", ENDINGS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_decays(name, decay):
    """Without a gradient, a parameter moves by decay alone."""
    zeros = jax.tree.map(np.zeros_like, draw(0))
    found = run(options_of(name, decay=decay, muon__adam_ratio=1.0), [zeros])
    for path, x in by_name(draw(0)).items():
        kept = 1 - schedule(0) * DECAY if path.endswith(ENDINGS[decay]) else 1
        np.testing.assert_allclose(found[path], kept * x, rtol=1e-5, err_msg=path)


def test_muon_orthogonalises_every_layer_of_a_stacked_kernel():
    """Jordan 2024: the update is U Vᵀ of the gradient, its singular values roughly 1."""
    as_matrix = {  # [inputs, outputs] of each layer
        "stack/layers/attention/query/kernel": (8, 6),
        "stack/layers/attention/out/kernel": (6, 8),
        "stack/layers/feed_forward/in/kernel": (8, 12),
    }
    grads, before = draw(1), by_name(draw(0))
    after = run(options_of("muon", weight_decay=0.0), [grads], lambda t: 1.0)
    for name, (n_in, n_out) in as_matrix.items():
        for layer in range(2):
            update = (before[name] - after[name])[layer].reshape(n_in, n_out)
            u, _, vt = np.linalg.svd(by_name(grads)[name][layer].reshape(n_in, n_out))
            inside = u.T @ update @ vt.T / max(1, n_out / n_in) ** 0.5
            n = min(n_in, n_out)
            values = np.diag(inside)[:n]
            assert (values > 0.65).all(), (name, values)
            assert (values < 1.25).all(), (name, values)
            inside[range(n), range(n)] = 0
            assert abs(inside).max() < 1e-3, name


def test_muon_orthogonalises_every_expert():
    rng = np.random.default_rng(0)
    path = ("stack", "layers", "feed_forward", "experts", "out", "kernel")
    before, gradient = (np.float32(rng.normal(size=(2, 3, 12, 8))) for _ in range(2))
    params, grads = (unflatten_dict({path: x}) for x in (before, gradient))
    optimizer = optimizer_of(options_of("muon", weight_decay=0.0), lambda t: 1.0)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    update = flatten_dict(updates)[path]
    for layer in range(2):
        for expert in range(3):
            values = np.linalg.svd(update[layer, expert], compute_uv=False)
            assert (values > 0.65).all()
            assert (values < 1.25).all()


def test_muon_leaves_the_other_parameters_to_adam():
    options = options_of("muon", muon__adam_ratio=0.25, weight_decay=0.0, adamw__b2=0.999)
    found = run(options, [draw(t + 1) for t in range(3)])
    step = adam(0.9, 0.999, 1e-8)
    expected = reference(lambda *args: 0.25 * step(*args), decays=lambda name: False)
    for name in ("tokens/embedding", "head/kernel", "stack/layers/attention/query/bias"):
        np.testing.assert_allclose(found[name], expected[name], atol=2e-6, err_msg=name)


def test_muon_ratio_scales_the_other_parameters_only():
    before = by_name(draw(0))
    moved = {}
    for ratio in (0.1, 0.2):
        after = run(options_of("muon", muon__adam_ratio=ratio, weight_decay=0.0), [draw(1)])
        moved[ratio] = {name: after[name] - x for name, x in before.items()}
    for name in before:
        muon = name.endswith("kernel") and "layers" in name
        factor = 1 if muon else 2
        np.testing.assert_allclose(
            moved[0.2][name], factor * moved[0.1][name], atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize(("clip", "factor"), [(0.0, 1), (1.0, 0.1), (9.0, 0.9), (11.0, 1)])
def test_the_global_norm_is_clipped(clip, factor):
    grads = draw(1)
    norm = np.sqrt(sum((g**2).sum() for g in by_name(grads).values()))
    grads = jax.tree.map(lambda g: np.float32(g * 10 / norm), grads)
    options = options_of("sgd", sgd__momentum=0.0, weight_decay=0.0, clip_norm=clip)
    after = run(options, [grads], lambda t: 1.0)
    for name, x in by_name(draw(0)).items():
        np.testing.assert_allclose(after[name], x - factor * by_name(grads)[name], atol=1e-6)
