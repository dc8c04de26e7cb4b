"""JSON request bodies: typed fields, and errors in OpenAI's format."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from lm.errors import UserError, nearest
from lm.storage import parse_json

_BODY_SECONDS = 60.0  # timeout for receiving a body
# Fields that OpenAI's clients send but that do not affect a reply.
_WITHOUT_EFFECT = (
    *("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"),
    *("parallel_tool_calls", "verbosity", "prompt_cache_retention"),
)


class ApiError(Exception):
    """Error reported to the client in OpenAI's format.

    Attributes:
        status: HTTP status.
        param: invalid parameter, or None.
        code: machine-readable code.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str = ""):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or None

    def body(self) -> dict[str, Any]:
        """Return the JSON object."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kinds.get(self.status, kind)}
        return {"error": error | {"param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the response; with Retry-After if the client should try again."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        headers |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return JSONResponse(self.body(), self.status, headers)


def wrong(name: str, problem: str) -> ApiError:
    """Return the error for an invalid parameter."""
    return ApiError(400, f"{name}: {problem}", name)


async def read_body(request: Request, most_bytes: int) -> Body:
    """Read the JSON object of a request.

    Raises:
        ApiError: it is too large, too slow, or not a JSON object.
        ClientDisconnect: the client has disconnected.
    """
    found = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                found += part
                if len(found) > most_bytes:
                    raise ApiError(413, f"the body is larger than {most_bytes} bytes")
    except TimeoutError:
        raise ApiError(408, "the body did not arrive in time", code="timeout") from None
    except ClientDisconnect:
        raise
    try:
        value = parse_json(bytes(found), "the body", whole_characters=True)
    except UserError as error:
        raise ApiError(400, str(error)) from None
    return Body(value)


class Body:
    """Fields of a JSON object; null counts as missing."""

    def __init__(self, values: dict[str, Any]):
        self._values = {name: value for name, value in values.items() if value is not None}
        self._known = set(_WITHOUT_EFFECT)

    def raw(self, name: str) -> Any:
        """Return a field unconverted; None if missing."""
        self._known.add(name)
        return self._values.get(name)

    def has(self, name: str) -> bool:
        """Return whether a field is present."""
        return self.raw(name) is not None

    def text(self, name: str, default: str | None = None) -> str:
        """Return a text field; required unless there is a default."""
        value = self.raw(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise wrong(name, "it is required" if value is None else "it must be a text")
        return value

    def flag(self, name: str) -> bool:
        """Return a boolean field, false by default."""
        value = self.raw(name)
        if not isinstance(value, bool | None):
            raise wrong(name, "it must be true or false")
        return bool(value)

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """Return an integer field within bounds."""
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise wrong(name, f"it must be an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Return a number field within bounds."""
        value = self.raw(name)
        if value is None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            limits = f" to {high:g}" if math.isfinite(high) else ""
            raise wrong(name, f"it must be a number from {low:g}{limits}")
        return float(value)

    def texts(self, name: str, most: int) -> list[str]:
        """Return a field with a text or a list of texts; [] by default."""
        value = self.raw(name)
        found = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(found, list) or not all(isinstance(x, str) and x for x in found):
            raise wrong(name, "it must be a text or a list of texts, none of them empty")
        if len(found) > most:
            raise wrong(name, f"more than {most} texts")
        return found

    def ids(self, name: str, most: int) -> tuple[int, ...]:
        """Return a list of token ids; () by default."""
        value = [] if (given := self.raw(name)) is None else given
        if not is_ids(value) or len(value) > most:
            raise wrong(name, f"it must be a list of at most {most} token ids")
        return tuple(value)

    def object(self, name: str) -> dict[str, Any]:
        """Return a JSON object field; {} by default."""
        value = self.raw(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise wrong(name, "it must be an object")
        return value

    def finish(self, unsupported: Sequence[str] = ()) -> None:
        """Raise ApiError for a field that was not read.

        Args:
            unsupported: fields of OpenAI's API that this server does not support.
        """
        for name in self._values.keys() - self._known:
            if name in unsupported:
                raise wrong(name, "this server does not support it")
            raise wrong(name, f"unknown parameter{nearest(name, self._known)}")


def is_ids(value: Any) -> bool:
    """Return whether a JSON value is a list of token ids."""
    return isinstance(value, list) and all(
        isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**31 for x in value
    )


def with_plain_texts(messages: Any) -> Any:
    """Join content parts of messages to one text each; return anything but a list unchanged.

    Raises:
        ApiError: a part is not text.
    """

    def text_of(part: Any) -> str:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if isinstance(text, str):
            return text
        raise wrong("messages", "content parts must be text: this server supports no others")

    def plain(message: Any) -> Any:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list):
            return message
        return message | {"content": "".join(map(text_of, content))}

    return list(map(plain, messages)) if isinstance(messages, list) else messages
