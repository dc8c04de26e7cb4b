"""Reading of JSON bodies: typed fields, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from lm.errors import UserError, nearest
from lm.storage import parse_json

_BODY_SECONDS = 60.0  # a client that is slower sends no request
# Of OpenAI's clients; what they ask for does not change a reply.
_WITHOUT_EFFECT = (
    *("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"),
    *("parallel_tool_calls", "verbosity", "prompt_cache_retention"),
)


class ApiError(Exception):
    """Error that a client is told, in OpenAI's form.

    Attributes:
        status: HTTP status.
        param: parameter that is wrong; None: none in particular.
        code: word for programs.
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
        """Return the response; one that asks for patience says for how long."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        headers |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return JSONResponse(self.body(), self.status, headers)


def wrong(name: str, problem: str) -> ApiError:
    """Return the error of a parameter."""
    return ApiError(400, f"{name}: {problem}", name)


async def read_body(request: Request, most_bytes: int) -> Body:
    """Return the JSON object of a request.

    Raises:
        ApiError: it is too large, too slow, or no JSON object.
        ClientDisconnect: the client has gone.
    """
    found = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                found += part
                if len(found) > most_bytes:
                    raise ApiError(413, f"the body is above {most_bytes} bytes")
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
    """Fields of a JSON object; null is as if a field were not there."""

    def __init__(self, values: dict[str, Any]):
        self._values = {name: value for name, value in values.items() if value is not None}
        self._known = set(_WITHOUT_EFFECT)

    def raw(self, name: str) -> Any:
        """Return a field as it is; None if it is not there."""
        self._known.add(name)
        return self._values.get(name)

    def has(self, name: str) -> bool:
        """Return whether a field is there."""
        return self.raw(name) is not None

    def text(self, name: str, default: str | None = None) -> str:
        """Return a text; without a default it must be there."""
        value = self.raw(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise wrong(name, "a text is needed" if value is None else "it must be a text")
        return value

    def flag(self, name: str) -> bool:
        """Return true or false, false by default."""
        value = self.raw(name)
        if not isinstance(value, bool | None):
            raise wrong(name, "it must be true or false")
        return bool(value)

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """Return an integer between two bounds."""
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise wrong(name, f"it must be an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Return a number between two bounds."""
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
        """Return a list of texts, of which one may stand alone; [] by default."""
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
        """Return a JSON object, {} by default."""
        value = self.raw(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise wrong(name, "it must be an object")
        return value

    def finish(self, unsupported: Sequence[str] = ()) -> None:
        """Raise ApiError for a field that nothing reads.

        Args:
            unsupported: fields of OpenAI's API that a server of this project does not have.
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
    """Return messages, contents in parts joined to one text each; what is no list as it is.

    Raises:
        ApiError: a part is something else than a text.
    """

    def text_of(part: Any) -> str:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if isinstance(text, str):
            return text
        raise wrong("messages", "a part of a content must be a text: this server reads no others")

    def plain(message: Any) -> Any:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list):
            return message
        return message | {"content": "".join(map(text_of, content))}

    return list(map(plain, messages)) if isinstance(messages, list) else messages
