"""The page at `/`: served without a key, self-contained, with a strict policy."""

from __future__ import annotations

import base64
import hashlib
import re

import httpx
from starlette.applications import Starlette
from starlette.testclient import TestClient

from lm.serving.playground import playground_routes


def test_page_is_self_contained_and_runs_its_own_script_alone():
    response = TestClient(Starlette(routes=playground_routes())).get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for element in ("script", "style"):
        (text,) = re.findall(rf"<{element}[^>]*>(.*?)</{element}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{element}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"https?://|\burl\(|@import|\bsrc=", response.text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", response.text)
    assert not re.search(r"\s(style|on\w+)=\"", response.text)  # the policy would drop them


def test_server_has_the_page_and_says_which_models_chat(server):
    assert "<title>lm playground</title>" in httpx.get(f"{server.url}/").text
    (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert (model["chat"], model["has_source"]) == (True, False)
