"""Starting from another run: which parameters are used, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lm.config import default
from lm.errors import UserError
from lm.experiment import build
from lm.models.variables import MODEL_STATE, flat, nested
from lm.qk_clip import LARGEST
from lm.runs.checkpoints import Checkpoints
from lm.training.warm_start import initial_state, map_parameters

SOURCE = {"tokens/embedding": (9, 4), "stack/layers/in/kernel": (2, 4, 8), "mlm/bias": (9,)}
MODEL = {"tokens/embedding": (9, 4), "stack/layers/in/kernel": (2, 4, 8), "head/kernel": (4, 3)}
ADAPTERS = {
    "lora/stack/layers/in/kernel/a": (2, 4, 1),
    "lora/stack/layers/in/kernel/b": (2, 1, 8),
}


def plan(params, source, **values):
    options = default().init
    options.update({"from": "RUN", **values})
    shapes = (
        {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in tree.items()}
        for tree in (params, source)
    )
    return map_parameters(options, *shapes)


def test_names_that_agree_are_loaded():
    found = plan(SOURCE, SOURCE)
    assert found.loaded == {path: path for path in SOURCE}
    assert not found.fresh
    assert not found.left


def test_new_and_unused_parameters_must_be_named():
    found = plan(MODEL, SOURCE, fresh="^head", leave="mlm/")
    assert found.loaded.keys() == MODEL.keys() & SOURCE.keys()
    assert found.fresh == ["head/kernel"]
    assert found.left == ["mlm/bias"]


def test_qk_clip_logits_are_ignored():
    """A run with QK-clip starts from one without, and the other way round."""
    clipped = SOURCE | {f"{MODEL_STATE}/stack/layers/attention/{LARGEST}": (2, 4)}
    for params, source in ((SOURCE, clipped), (clipped, SOURCE), (clipped, clipped)):
        found = plan(params, source)
        assert found.loaded == {path: path for path in SOURCE}
        assert found.left == []


def test_fresh_parameters_are_fresh_even_if_the_source_has_them():
    found = plan(SOURCE, SOURCE, fresh="mlm,tokens")
    assert found.loaded.keys() == {"stack/layers/in/kernel"}
    assert found.fresh == found.left == ["tokens/embedding", "mlm/bias"]


def test_another_shape_may_be_left_fresh():
    found = plan(SOURCE | {"mlm/bias": (3,)}, SOURCE, fresh="mlm")
    assert found.fresh == found.left == ["mlm/bias"]


def test_names_are_mapped():
    source = {f"bert/{path}": shape for path, shape in SOURCE.items()}
    found = plan(SOURCE, source, rename="^bert/=>")
    assert found.loaded == {path: f"bert/{path}" for path in SOURCE}
    params = {path.replace("stack/layers", "encoder/blocks"): x for path, x in SOURCE.items()}
    found = plan(params, source, rename=r"bert/=>, ^stack/(\w+)/in=>encoder/blocks/in")
    assert found.loaded["encoder/blocks/in/kernel"] == "bert/stack/layers/in/kernel"


def test_low_rank_parameters_are_fresh_by_nature():
    found = plan(SOURCE | ADAPTERS, SOURCE)
    assert found.loaded.keys() == SOURCE.keys()
    assert found.fresh == list(ADAPTERS)


MANY = {f"block_{i}/bias": (1,) for i in range(8)}


@pytest.mark.parametrize(
    ("params", "source", "values", "words"),
    [
        (MODEL, SOURCE, {"leave": "mlm"}, "1 of this model are missing there .*: head/kernel"),
        (MODEL, SOURCE, {"fresh": "head"}, r"1 there do not exist here .*: mlm/bias"),
        (SOURCE, {**SOURCE, **MANY}, {}, "8 there .*: block_0/bias, .*block_4/bias, …;"),
        (
            SOURCE | {"tokens/embedding": (8, 4)},
            SOURCE,
            {},
            r"1 have a different shape .*: tokens/embedding \(8, 4\) from \(9, 4\)",
        ),
        (MODEL, SOURCE, {"fresh": "head,hed"}, "--config.init.fresh: 'hed' matches no parameter"),
        (MODEL, SOURCE, {"leave": "nlm"}, "--config.init.leave: 'nlm' matches no parameter"),
        (SOURCE, SOURCE, {"rename": "mlm"}, "'mlm' is not PATTERN=>NAME"),
        (SOURCE, SOURCE, {"rename": "nlm=>x"}, "'nlm=>x' changes no name"),
        (SOURCE, SOURCE, {"rename": "(=>x"}, "--config.init.rename: .*unterminated"),
        (SOURCE, SOURCE, {"rename": ".*=>x"}, "gives two parameters the name x"),
    ],
)
def test_invalid_input_is_rejected(params, source, values, words):
    with pytest.raises(UserError, match=words):
        plan(params, source, **values)


# --- real experiments


@pytest.fixture
def make_experiment(tiny_config):
    def make(n_devices=1, **changes):
        config = tiny_config(model__vocab_size=64, data__sequence_length=16, **changes)
        return build(config, jax.devices()[:n_devices])

    return make


def save(experiment, run: Path) -> dict[str, np.ndarray]:
    """A run of two checkpoints of random parameters; those of the newer."""
    config = json.loads(experiment.config.to_json())
    metadata = {"config": config, "fingerprint": {"tokenizer": "theirs"}}
    checkpoints = Checkpoints(run / "checkpoints", experiment.config.checkpoint, metadata)
    state = experiment.init_state()
    for step in (1, 2):
        rng = np.random.default_rng(step)
        drawn = {p: np.float32(rng.normal(size=x.shape)) for p, x in flat(state.params).items()}
        on_device = jax.device_put(nested(drawn), experiment.state_sharding.params)
        checkpoints.save(step, replace(state, params=on_device))
    checkpoints.close()
    return drawn


def start(experiment, digest="theirs"):
    said: list[str] = []
    return initial_state(experiment, SimpleNamespace(digest=digest), said.append), "\n".join(said)


def test_without_a_source_everything_is_fresh(make_experiment):
    experiment = make_experiment()
    state, said = start(experiment)
    assert not said
    jax.tree.map(np.testing.assert_array_equal, state, experiment.init_state())


def test_parameters_match_the_source_and_nothing_else_is(make_experiment, tmp_path):
    theirs = save(make_experiment(), tmp_path)
    head = {"model__tie_embeddings": False, "init__fresh": "head"}
    experiment = make_experiment(8, parallel__mesh__fsdp=2, parallel__mesh__tensor=2,
                                 init__from=str(tmp_path), **head)  # fmt: skip
    state, said = start(experiment)
    fresh = experiment.init_state()
    assert int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, fresh.opt_state)
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(str(s)), state.params,
                 experiment.state_sharding.params)  # fmt: skip
    found = flat(state.params)
    assert found.keys() == theirs.keys() | {"head/kernel"}
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    np.testing.assert_array_equal(found["head/kernel"], fresh.params["head"]["kernel"])
    assert f"loaded {len(theirs)}: " in said
    assert all(path in said for path in theirs)
    assert "fresh 1: head/kernel" in said
    assert "left 0: none" in said
    assert "step 2" in said


def test_source_may_be_an_average_or_one_checkpoint(make_experiment, tmp_path):
    save(make_experiment(), tmp_path)

    def embedding(**changes):
        return start(make_experiment(**changes))[0].params["tokens"]["embedding"]

    last = embedding(init__from=str(tmp_path))
    first = embedding(init__from=str(tmp_path / "checkpoints" / "1"))
    mean = embedding(init__from=str(tmp_path), init__average=2)
    assert abs(first - last).max() > 1
    np.testing.assert_allclose(mean, (first + last) / 2, rtol=1e-6)


def test_table_of_another_tokenizers_tokens_is_rejected(make_experiment, tmp_path):
    save(make_experiment(), tmp_path)
    with pytest.raises(UserError, match="tokens/embedding would mix up tokens"):
        start(make_experiment(init__from=str(tmp_path)), "ours")
    start(make_experiment(init__from=str(tmp_path), init__fresh="tokens"), "ours")


def test_no_such_run(make_experiment, tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        start(make_experiment(init__from=str(tmp_path / "nowhere")))
