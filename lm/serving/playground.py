"""Web page at `/` for trying out the served models."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def playground_routes() -> list[Route]:
    """Return the route of the page, with a policy that allows only its own script."""
    page = files("lm.serving").joinpath("playground.html").read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _digest(page, "script"),
        "style-src": _digest(page, "style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "content-security-policy": "; ".join(" ".join(rule) for rule in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    def playground(request: Request) -> Response:
        return Response(page, media_type="text/html", headers=headers)

    return [Route("/", playground, methods=["GET"])]


def _digest(page: str, element: str) -> str:
    """Return the CSP hash of the page's only `<script>` or `<style>`."""
    (text,) = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
