"""JSON of runs, corpora and other programs: one reader, whose errors are one line.

A file may be empty, cut, full of zeros, not UTF-8, of another type, nested a million deep or hold
a number of 5,000 digits: each is a `UserError` that names the file.
"""

from __future__ import annotations

import json
from typing import Any

from lm.errors import UserError

_NAMES = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
_NAMES |= {bool: "true or false", type(None): "null"}


def parse_json(
    text: str | bytes, place: object, kind: type = dict, *, whole_characters: bool = False
) -> Any:
    r"""Return the value of a JSON text.

    Args:
        text: the text; bytes are UTF-8, with or without a byte order mark.
        place: its file or line, for the message.
        kind: type that the value must have.
        whole_characters: refuse half surrogate pairs, such as "\ud83d", which UTF-8 cannot hold.

    Raises:
        UserError: the text is damaged, or its value has another type.
    """
    try:
        value = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
        if whole_characters:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        problem = "nested too deeply"
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 at byte {error.start}"
    except UnicodeEncodeError:
        problem = "half of a surrogate pair"
    except ValueError as error:
        problem = str(error).partition(";")[0] if text.strip() else "empty"
    else:
        if isinstance(value, kind):
            return value
        problem = f"{_NAMES[type(value)]} instead of {_NAMES[kind]}"
    raise UserError(f"{place}: damaged JSON ({problem})")


def read_json(file: Any, kind: type = dict, *, whole_characters: bool = False) -> Any:
    """Return the value in a JSON file, a local path or one in a bucket.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is damaged, cannot be read, or its value has another type than `kind`.
    """
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(str(file)) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    return parse_json(content, file, kind, whole_characters=whole_characters)
