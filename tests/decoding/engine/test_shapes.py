"""Programs lowered without arrays are the ones that the engine dispatches."""

import re

import jax
import jax.numpy as jnp
import pytest

from lm.decoding.engine import engine as engines
from lm.decoding.engine.programs import NewTokens, no_tokens
from lm.decoding.engine.requests import GenerationRequest
from lm.decoding.engine.shapes import lower_programs
from lm.decoding.engine.sizes import EngineOptions, count_pages, free_memory, page_bytes
from lm.decoding.weights import prepare

MESH = {"parallel__preset": "custom", "parallel__mesh__data": 2, "parallel__mesh__tensor": 2}


class Dispatched(Exception):
    """All programs have been called."""


@pytest.mark.parametrize(
    ("n_devices", "changes"),
    [
        (4, MESH | {"model__n_kv_heads": 2, "model__positions": "rotary"}),
        (1, {"objective__name": "prefix", "model__positions": "alibi", "decode__cache": "int8"}),
    ],
)
def test_texts_lowered_equal_those_of_serving(make_experiment, monkeypatch, n_devices, changes):
    experiment, params, _ = make_experiment("decoder", n_devices, **changes)
    params = jax.device_put(params, experiment.inference_sharding)
    options = EngineOptions(n_rows=3, context=12, page_size=2, chunk=4)
    served = {}
    lower = {name: getattr(engines, name).lower for name in ("read_chunk", "decode_rows")}

    def read_chunk(model, params, state, *args, **kwargs):
        lowered = lower["read_chunk"](model, params, state, *args, **kwargs)
        served.setdefault("chunk", lowered)  # those after it are shorter
        return state, NewTokens(no_tokens(model, (1, 1)), jnp.int32(1))

    def decode_rows(*args, **kwargs):
        served["decode"] = lower["decode_rows"](*args, **kwargs)
        raise Dispatched

    monkeypatch.setattr(engines, "read_chunk", read_chunk)
    monkeypatch.setattr(engines, "decode_rows", decode_rows)
    engine = engines.PagedEngine(experiment, params, options)
    engine.add(GenerationRequest((3, 4, 5, 6, 7) * 2, 2, seed=1))
    with pytest.raises(Dispatched):
        engine.step()

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    prepared, shapes = prepare(experiment, shapes)
    n_pages = count_pages(prepared, options, free_memory(jax.devices()[0]))
    planned = lower_programs(prepared, shapes, options, n_pages)
    assert texts(planned) == texts(served)


def test_draft_models_pages_take_memory_too(make_experiment):
    model, draft = (
        make_experiment("decoder", 1)[0],
        make_experiment("decoder", 1, model__n_layers=1)[0],
    )
    options = EngineOptions(n_rows=64, context=12, page_size=2)
    of_both = page_bytes(model, options) + page_bytes(draft, options)
    free = int(10.5 * of_both / 0.85)
    assert count_pages(model, options, free, draft) == 10
    assert count_pages(model, options, free) > 10


def texts(programs):
    """Their texts without names of functions: JAX numbers these by what else it has traced."""
    return {name: re.sub(r"@[\w.]+", "@", program.as_text()) for name, program in programs.items()}
