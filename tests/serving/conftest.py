"""Servers of the tiny run: one in a separate process, one inside the test's."""

from __future__ import annotations

import jax
import pytest
from runs import random_run
from server_process import ServerProcess
from starlette.testclient import TestClient

from lm.data.tokenizers.basic import ByteTokenizer
from lm.decoding.engine.sizes import EngineOptions
from lm.serving.app import Server, ServerOptions, make_app
from lm.serving.sampling_parameters import RequestLimits
from lm.serving.served_models import WeightsChoice, open_models

RANDOM = {
    "lstm": {"model.family": "lstm", "model.vocab_size": 320},
    "films": {
        "objective.name": "classification",
        "model.family": "encoder",
        "model.vocab_size": 320,
        "data.labels": "good,bad",
    },
}


@pytest.fixture(scope="session")
def server(tiny_run, tmp_path_factory):
    """Server of the tiny run that tests share."""
    log = tmp_path_factory.mktemp("server") / "log"
    found = ServerProcess(log, "--workdir", f"tiny={tiny_run}", "--rows", "4", "--log_texts")
    yield found
    if found.process.poll() is None:
        assert found.end() == 0, found.text()


@pytest.fixture(scope="session")
def client(tiny_run, tmp_path_factory):
    """Client of a server inside this process: the tiny run, an LSTM and a classifier.

    `client.server` is the server.
    """
    folder = tmp_path_factory.mktemp("runs")
    places = {"tiny": str(tiny_run)}
    for name, values in RANDOM.items():
        places[name] = str(random_run(folder / name, values, ByteTokenizer()))
    options = ServerOptions(RequestLimits(200, 64, 4), queue=2, body_bytes=10_000)
    one, app, models = jax.devices()[:1], None, []

    async def lazy(scope, receive, send):
        nonlocal app, models
        if app is None:  # in the event loop
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(jax, "devices", lambda *args: one)
                arguments = WeightsChoice(), {}, EngineOptions(n_rows=4), print, {}
                models = open_models(places, *arguments)
            found.server = Server({model.name: model for model in models}, options, None)
            app = make_app(found.server)
        await app(scope, receive, send)

    found = TestClient(lazy, raise_server_exceptions=False)
    with found:
        yield found
    for model in models:
        model.close()
