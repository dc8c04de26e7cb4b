"""A file of outputs, a line an input, that a second start of the same command continues.

Beside OUTPUT lies OUTPUT.json: what made it. Lines are written in order and whole, so that the
lines that are there say how far it came.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from lm.data.files import read_lines
from lm.data.records.record_files import Row, read_jsonl_rows
from lm.errors import UserError
from lm.parallel.hosts import is_primary_host


def read_inputs(file: Path, role: str, columns: str) -> list[str]:
    """The lines of a text file, or a field of each object of a .jsonl file; both may be .gz.

    The field is what `columns` (config.data.columns) names for the role, or else called as the
    role. UserError for a file that cannot be read, and for an object without such a text.
    """
    if not file.is_file():
        raise UserError(f"no file {file}")
    if not file.name.removesuffix(".gz").endswith(".jsonl"):
        return list(read_lines(file))
    pairs = (column.partition("=") for column in columns.split(","))
    field = {of.strip(): name.strip() for of, _, name in pairs}.get(role, role)
    return [_text(row, field) for row in read_jsonl_rows(file)]


def _text(row: Row, field: str) -> str:
    text = row.values.get(field)
    if row.problem or not isinstance(text, str):
        raise UserError(f"{row.where}: {row.problem or f'no text in a field {field!r}'}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{row.where}: {field!r} is not UTF-8") from error
    return text


def one_line(text: str) -> str:
    """A text with a space for each newline."""
    return text.replace("\r\n", " ").replace("\n", " ").replace("\r", " ")


def continue_file(
    output: Path,
    inputs: Sequence[str],
    made_by: Mapping[str, Any],
    lines_from: Callable[[int], Iterable[str]],
) -> None:
    """Write the lines of all inputs to `output`: after the n that are there, `lines_from(n)`.

    A last line that is not whole is dropped. UserError if what is there was made of other inputs,
    or not by the same `made_by` (values of JSON).
    """
    n_there = _prepare(output, inputs, made_by) if is_primary_host() else 0
    n_there = int(multihost_utils.broadcast_one_to_all(np.int32(n_there)))
    lines = lines_from(n_there)
    if not is_primary_host():
        for _ in lines:  # the other processes only compute
            pass
        return
    with output.open("a", encoding="utf-8", newline="\n") as stream:
        for line in lines:
            stream.write(line + "\n")
            stream.flush()


def _prepare(output: Path, inputs: Sequence[str], made_by: Mapping[str, Any]) -> int:
    """The number of whole lines in the output, which then ends with them."""
    about_file = output.with_name(f"{output.name}.json")
    try:
        there = output.read_bytes() if output.exists() else b""
        if there:
            _check_same(output, about_file, inputs, made_by)
        output.parent.mkdir(parents=True, exist_ok=True)
        about = {"inputs": _about(inputs), "made_by": made_by}
        temporary = about_file.with_name(f".{about_file.name}.tmp")
        temporary.write_text(json.dumps(about, indent=1, ensure_ascii=False))
        temporary.replace(about_file)
        whole = there[: there.rfind(b"\n") + 1]
        with output.open("ab") as stream:
            stream.truncate(len(whole))
    except (NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError) as error:
        raise UserError(f"cannot write to --output {output}: {error.strerror}") from None
    return whole.count(b"\n")


def _check_same(
    output: Path, about_file: Path, inputs: Sequence[str], made_by: Mapping[str, Any]
) -> None:
    elsewhere = f"delete {output} and {about_file.name}, or choose another --output"
    if not about_file.exists():
        raise UserError(f"{output} is there, but {about_file.name} is not: {elsewhere}")
    try:
        before = json.loads(about_file.read_text())
        changed = "; ".join(_differences(before["made_by"], made_by))
        # What came to the end of the inputs since then changes nothing before.
        same_inputs = before["inputs"] == _about(inputs[: before["inputs"]["lines"]])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{about_file} is damaged ({type(error).__name__}): {elsewhere}") from error
    if changed:
        raise UserError(f"{output} was made by another command ({changed}): {elsewhere}")
    if not same_inputs:
        raise UserError(f"{output} was made of other inputs: {elsewhere}")


def _about(inputs: Sequence[str]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(list(inputs)).encode()).hexdigest()
    return {"lines": len(inputs), "digest": digest}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            yield f"{name}: {before.get(name)} → {now.get(name)}"
