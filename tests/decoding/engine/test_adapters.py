"""Adapters of several LoRA runs over one base, in one batch."""

import asyncio

import jax
import numpy as np
import pytest

from lm.cli import main
from lm.decoding.engine.adapters import load_adapters
from lm.decoding.engine.engine import PagedEngine
from lm.decoding.engine.requests import GenerationRequest
from lm.decoding.engine.sizes import EngineOptions
from lm.errors import UserError
from lm.runs.checkpoints import ignore_line
from lm.runs.saved_params import restore_run
from lm.serving.served_models import WeightsChoice, open_models
from lm.serving.text_scores import _vectors

OPTIONS = EngineOptions(n_rows=4, context=32, page_size=4, chunk=8)
PROMPT = tuple(b"the model reads ")
SMALL = (
    *("model.n_layers=2", "model.d_model=16", "model.n_heads=2", "data.sequence_length=32"),
    *("data.batch_size=8", "data.tokenizer=byte", "train.steps=2", "checkpoint.every_steps=2"),
    *("model.positions=rotary", "optimizer.learning_rate=0.01"),
)
LORA = ("lora.rank=2", "optimizer.learning_rate=0.3", "train.steps=4")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_file, one_device_in_module):
    """A base; adapters of attention alone, and of all layers, with another rank; one too many."""
    folder = tmp_path_factory.mktemp("adapters")
    config = folder / "config.py"
    config.write_text(
        "from lm.config import default\n\n\ndef get_config():\n    return default()\n"
    )

    def train(name, *keys, base=""):
        given = dict(key.split("=", 1) for key in (*SMALL, f"data.source=text:{text_file}", *keys))
        given |= {"init.from": str(folder / base)} if base else {}
        command = ["train", "--config", str(config), "--workdir", str(folder / name)]
        assert main([*command, *(f"--config.{x}={value}" for x, value in given.items())]) == 0

    train("base")
    train("attention", *LORA, "lora.targets=attention/(query|out)", base="base")
    train("all", *LORA, "lora.rank=3", "lora.alpha=5", "lora.targets=layers.*kernel", base="base")
    train("norms", *LORA, "lora.train=norm", base="base")
    return folder


def replies(engine, adapters, seed):
    numbers = [
        engine.add(GenerationRequest(PROMPT, 8, seed=seed, top_logprobs=0, adapter=name))
        for name in adapters
    ]
    tokens = {n: [] for n in numbers}
    while found := engine.step():
        for progress in found:
            tokens[progress.request] += progress.tokens
    return [[(token.id, token.logprob) for token in tokens[n]] for n in numbers]


def test_rows_of_one_batch_have_adapters_of_their_own(runs):
    """Replies equal those of runs with merged updates; replies of the base are unaffected."""
    experiment, params, _ = restore_run(runs / "base", {}, ignore_line, any_batch=True)
    folders = {name: runs / name for name in ("attention", "all")}
    adapters = load_adapters(runs / "base", folders, experiment.param_infos)
    engine = PagedEngine(experiment, params, OPTIONS, tuple(folders), adapters)
    base, *adapted, _ = replies(engine, ["", "attention", "all", "attention"], seed=1)
    assert [base] == replies(PagedEngine(experiment, params, OPTIONS), [""], seed=1)
    for name, reply in zip(folders, adapted, strict=True):
        merged = restore_run(runs / name, {}, ignore_line, any_batch=True)[:2]
        (expected,) = replies(PagedEngine(*merged, OPTIONS), [""], seed=1)
        assert [token for token, _ in reply] == [token for token, _ in expected]
        np.testing.assert_allclose([p for _, p in reply], [p for _, p in expected], atol=1e-4)
        assert reply != base
        request = GenerationRequest(PROMPT, 1, top_logprobs=2, adapter=name)
        scores = engine.prompt_logprobs(request)
        logits = jax.jit(merged[0].model.apply)({"params": merged[1]}, np.array([PROMPT]))
        logprobs = jax.nn.log_softmax(logits[0])
        expected_scores = [logprobs[i, token] for i, token in enumerate(PROMPT[1:])]
        np.testing.assert_allclose([x.logprob for x in scores[1:]], expected_scores, atol=1e-4)
    # The prompt is in the cache for each adapter; none reads another's pages.
    assert replies(engine, ["all", "", "attention"], seed=1) == [adapted[1], base, adapted[0]]


def test_vectors_match_the_adapter(runs):
    options = WeightsChoice(), {}, OPTIONS, print, {"all": str(runs / "all")}

    async def vectors(places, name, *adapters):
        (model,) = open_models(places, *options[:-1], *(adapters or ({},)))
        found = _vectors(model, model.params, [PROMPT, PROMPT[:3]], model.adapter_number(name))
        model.close()
        return found

    of_base = asyncio.run(vectors({"base": str(runs / "base")}, "all", options[-1]))
    own = asyncio.run(vectors({"all": str(runs / "all")}, "all"))
    np.testing.assert_allclose(of_base, own, atol=1e-5)
    plain = asyncio.run(vectors({"base": str(runs / "base")}, "base", options[-1]))
    assert np.abs(of_base - plain).max() > 1e-3


@pytest.mark.parametrize(
    ("base", "name", "words"),
    [
        ("base", "norms", "differs from the base"),
        ("base", "base", "no LoRA adapter"),
        ("base", "missing", "no checkpoint"),
    ],
)
def test_adapter_of_another_base_is_rejected(runs, base, name, words):
    experiment, *_ = restore_run(runs / "base", {}, ignore_line, any_batch=True)
    with pytest.raises(UserError, match=words):
        load_adapters(runs / base, {name: runs / name}, experiment.param_infos)


def test_unknown_adapter_is_rejected(runs):
    experiment, params, _ = restore_run(runs / "base", {}, ignore_line, any_batch=True)
    with pytest.raises(UserError, match="no adapter 'other'"):
        PagedEngine(experiment, params, OPTIONS).add(GenerationRequest((1,), 1, adapter="other"))
