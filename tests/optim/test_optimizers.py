"""Updates against the papers' algorithms, written in numpy for one parameter at a time."""

import re

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


def ademamix(b1, b2, b3, alpha, warmup, eps=1e-8):
    """Pagliardini et al. 2024, Algorithm 1 and equations of its schedulers."""

    def step(x, g, t, memory):
        w = min(t / warmup, 1) if warmup else 1
        slow = np.exp(np.log(b1) * np.log(b3) / ((1 - w) * np.log(b3) + w * np.log(b1)))
        m1 = memory["m1"] = b1 * memory.get("m1", 0) + (1 - b1) * g
        m2 = memory["m2"] = slow * memory.get("m2", 0) + (1 - slow) * g
        v = memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * g**2
        return (m1 / (1 - b1**t) + w * alpha * m2) / (np.sqrt(v / (1 - b2**t)) + eps)

    return step


def only_agreeing(step):
    """Liang et al. 2024, Algorithm 1, for a stack of matrices or vectors."""

    def agreeing(x, g, t, memory):
        u = step(x, g, t, memory)
        phi = u * g > 0
        return u * phi * phi.size / (phi.sum() + 1)

    return agreeing


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
    "ademamix": (options_of("ademamix"), ademamix(0.9, 0.999, 0.9999, 5, 0)),
    "ademamix, warming up": (
        options_of("ademamix", ademamix__b3=0.99, ademamix__rise_steps=2, ademamix__alpha=8.0),
        ademamix(0.9, 0.999, 0.99, 8, 2),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_three_steps_match_the_paper(case):
    options, step = CASES[case]
    found = run(options, [draw(t + 1) for t in range(3)])
    expected = reference(step, decays=is_matrix)
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, atol=2e-6, err_msg=name)


def layer_of(name, i):
    """Slice of a layer of a stacked parameter; all of another one."""
    return i if "layers" in name else slice(None)


@pytest.mark.parametrize("parts", ["updates", "decay", "both"])
def test_cautious_steps_match_the_papers(parts):
    found = run(options_of("lion", cautious=parts), [draw(t + 1) for t in range(3)])
    layers = [0, 1]
    params, memory = by_name(draw(0)), {}
    for t in range(3):
        for name, g in by_name(draw(t + 1)).items():
            for i in layers if "layers" in name else [0]:
                at = layer_of(name, i)
                step = lion(0.9, 0.99)
                step = step if parts == "decay" else only_agreeing(step)
                x = params[name][at].copy()
                u = step(x, g[at], t + 1, memory.setdefault((name, i), {}))
                kept = 1 if parts == "updates" else u * x >= 0
                decay = DECAY * x * kept if is_matrix(name) else 0
                params[name][at] = x - schedule(t) * (u + decay)
    for name, x in params.items():
        np.testing.assert_allclose(found[name], x, atol=2e-6, err_msg=name)


def test_average_is_corrected_for_its_start():
    """Kingma and Ba 2015, §7.2; gradients do not depend on it."""
    gradients = [draw(t + 1) for t in range(3)]
    last = [run(options_of("sgd"), gradients[: t + 1]) for t in range(3)]
    found = run(options_of("sgd", ema=0.7), gradients)
    for name, x in found.items():
        mean = sum(0.3 * 0.7 ** (2 - t) * last[t][name] for t in range(3)) / (1 - 0.7**3)
        np.testing.assert_allclose(x, mean, atol=2e-6, err_msg=name)


def test_schedule_free_matches_the_paper():
    """Defazio et al. 2024, as in their AdamWScheduleFree, with gradients that depend on y."""
    b1, b2, eps = 0.8, 0.99, 1e-8

    def rate(t):
        return 0.1 * (t + 1) / 3  # of a warm-up

    options = options_of("schedule_free", schedule_free__b1=b1, schedule_free__b2=b2)
    optimizer = optimizer_of(options, rate)
    params, gradients = draw(0), [draw(t + 1) for t in range(3)]
    state = optimizer.init(params)
    x, v = by_name(params), dict.fromkeys(by_name(params), 0)
    z, total = dict(x), 0
    for t, grads in enumerate(gradients):
        at = optimizer.point(state, params)
        grads = jax.tree.map(lambda g, y: g + 0.3 * y, grads, at)
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        total += rate(t) ** 2
        for name, g in by_name(gradients[t]).items():
            y = (1 - b1) * z[name] + b1 * x[name]
            g = g + 0.3 * y
            v[name] = b2 * v[name] + (1 - b2) * g**2
            u = g / (np.sqrt(v[name] / (1 - b2 ** (t + 1))) + eps)
            z[name] = z[name] - rate(t) * (u + (DECAY * y if is_matrix(name) else 0))
            c = rate(t) ** 2 / total
            x[name] = (1 - c) * x[name] + c * z[name]
    for name, found in by_name(params).items():
        np.testing.assert_allclose(found, x[name], atol=2e-6, err_msg=name)


def soap_of_a_matrix(gradients, sides, b1=0.95, b2=0.95, eps=1e-8):
    """Directions of Vyas et al. 2024, Algorithm 3, with a new basis at every step."""
    m = v = 0
    identity = [np.eye(n) for n in gradients[0].shape]
    factors = [0, 0]

    def outer(side, g):
        return g @ g.T if side == 0 else g.T @ g

    bases = list(identity)
    for t, g in enumerate(gradients):
        rotated = bases[0].T @ g @ bases[1]
        if t == 0:
            yield 0 * g
        else:
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * rotated**2
            n = bases[0].T @ (m / (1 - b1**t)) @ bases[1] / (np.sqrt(v / (1 - b2**t)) + eps)
            yield bases[0] @ n @ bases[1].T
        for side in sides:
            factors[side] = b2 * factors[side] + (1 - b2) * outer(side, g)
            if t == 0:
                bases[side] = np.linalg.eigh(factors[side])[1][:, ::-1]
            else:
                bases[side] = np.linalg.qr(factors[side] @ bases[side])[0]


def test_soap_matches_the_paper():
    """Sides of 8 keep their basis, so that no two eigenvalues are 0 and eigenvectors are unique."""
    options = options_of("soap", soap__every=1, soap__max_dim=7, weight_decay=0.0)
    gradients = [draw(t + 1) for t in range(4)]
    found, before = run(options, gradients, lambda t: 1.0), by_name(draw(0))
    cases = [
        ("tokens/embedding", slice(None), (6, 8), [0]),
        ("head/kernel", slice(None), (8, 6), [1]),
    ]
    for i in range(2):
        cases.append(("stack/layers/attention/query/kernel", i, (8, 6), [1]))
        cases.append(("stack/layers/attention/out/kernel", i, (6, 8), [0]))
        cases.append(("stack/layers/attention/query/bias", i, (1, 6), []))
    for name, at, shape, sides in cases:
        of_matrix = [by_name(g)[name][at].reshape(shape) for g in gradients]
        expected = before[name][at].reshape(shape) - sum(soap_of_a_matrix(of_matrix, sides))
        moved = found[name][at].reshape(shape)
        np.testing.assert_allclose(moved, expected, atol=1e-4, err_msg=name)


def test_soap_gives_lapack_one_matrix_at_a_time():
    """Two batched calls at the same time wait for each other for ever, under JAX 0.10."""
    params = draw(0)
    optimizer = optimizer_of(options_of("soap"), schedule)
    lowered = jax.jit(optimizer.update).lower(params, optimizer.init(params), params)
    calls = re.findall(r"@lapack_\w+\((.*)", lowered.as_text())
    assert len(calls) > 4
    for call in calls:
        assert not re.search(r"tensor<[2-9]\d*x\d+x\d+xf32>", call), call


def test_soap_in_both_bases_and_between_two_new_ones():
    params, gradients = (
        {},
        [np.float32(np.random.default_rng(t).normal(size=(6, 6))) for t in (1, 2, 3)],
    )
    params = {"kernel": np.zeros((6, 6), np.float32)}
    every_step = list(soap_of_a_matrix(np.float64(gradients), [0, 1]))
    for every in (1, 3):  # a basis that stays for three steps is that of the first gradient
        optimizer = optimizer_of(
            options_of("soap", soap__every=every, weight_decay=0.0), lambda t: 1.0
        )
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for t, g in enumerate(gradients):
            updates, state = update({"kernel": g}, state, params)
            if t < 2 or every == 1:
                np.testing.assert_allclose(updates["kernel"], -every_step[t], atol=2e-4)
            else:
                assert np.abs(updates["kernel"] + every_step[t]).max() > 1e-2


@pytest.mark.parametrize("parameter_scale", [True, False])
def test_adafactor_matches_the_paper(parameter_scale):
    options = options_of(
        "adafactor", adafactor__parameter_scale=parameter_scale, adafactor__min_dim=6
    )
    found = run(options, [draw(t + 1) for t in range(3)])
    expected = reference(adafactor(parameter_scale), decays=is_matrix)
    for name in ("tokens/embedding", "head/kernel", "stack/final_norm/scale"):
        np.testing.assert_allclose(found[name], expected[name], atol=2e-6, err_msg=name)


def test_adafactor_treats_layers_separately():
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
def test_weight_decay_mask(name, decay):
    """Without a gradient, a parameter moves by decay alone."""
    zeros = jax.tree.map(np.zeros_like, draw(0))
    found = run(options_of(name, decay=decay, muon__adam_ratio=1.0), [zeros])
    for path, x in by_name(draw(0)).items():
        kept = 1 - schedule(0) * DECAY if path.endswith(ENDINGS[decay]) else 1
        np.testing.assert_allclose(found[path], kept * x, rtol=1e-5, err_msg=path)


def test_muon_orthogonalizes_every_layer_of_a_stacked_kernel():
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


def newton_schulz(x, steps=5):
    """Jordan 2024, of a matrix with no more rows than columns."""
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.parametrize(("rms", "neuron_b2"), [(0.2, 0.0), (0.0, 0.9), (0.2, 0.9)])
def test_variants_of_muon_match_the_papers(rms, neuron_b2):
    """Scale of Moonlight (Liu et al. 2025, eq. 4); NorMuon (Li et al. 2025, released code)."""
    changes = {"muon__rms": rms, "muon__neuron_b2": neuron_b2}
    gradients = [draw(t + 1) for t in range(3)]
    found = run(options_of("muon", **changes), gradients)
    for name, shape in (("query", (8, 6)), ("out", (6, 8))):
        name = f"stack/layers/attention/{name}/kernel"
        for i in range(2):
            x, m, v = by_name(draw(0))[name][i].reshape(shape), 0, 0
            for t in range(3):
                g = by_name(gradients[t])[name][i].reshape(shape)
                m = 0.95 * m + 0.05 * g
                ahead = 0.95 * m / (1 - 0.95 ** (t + 2)) + 0.05 * g / (1 - 0.95 ** (t + 1))
                wide = shape[0] <= shape[1]
                o = newton_schulz(ahead if wide else ahead.T)
                o = o if wide else o.T
                if neuron_b2:  # columns are the neurons
                    v = neuron_b2 * v + (1 - neuron_b2) * (o**2).mean(0, keepdims=True)
                    o = o / np.sqrt(v) * np.linalg.norm(o) / np.linalg.norm(o / np.sqrt(v))
                scale = rms * max(shape) ** 0.5 if rms else max(1, shape[1] / shape[0]) ** 0.5
                x = x - schedule(t) * (scale * o + DECAY * x)
            np.testing.assert_allclose(found[name][i].reshape(shape), x, atol=2e-5, err_msg=name)


def test_muon_orthogonalizes_every_expert():
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
def test_global_norm_is_clipped(clip, factor):
    grads = draw(1)
    norm = np.sqrt(sum((g**2).sum() for g in by_name(grads).values()))
    grads = jax.tree.map(lambda g: np.float32(g * 10 / norm), grads)
    options = options_of("sgd", sgd__momentum=0.0, weight_decay=0.0, clip_norm=clip)
    after = run(options, [grads], lambda t: 1.0)
    for name, x in by_name(draw(0)).items():
        np.testing.assert_allclose(after[name], x - factor * by_name(grads)[name], atol=1e-6)
