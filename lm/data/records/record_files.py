"""The rows of task files: TSV, CSV, JSON lines, line-aligned files, SQuAD's JSON.

Every format gives rows as names and values, and a bad row as the problem with it, so that one
policy can treat the bad rows of all formats.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from lm.data.files import read_bytes
from lm.errors import UserError


class Row(NamedTuple):
    """A row's values by column name; or, if `problem` says something, what is wrong with it."""

    where: str  # FILE:LINE
    values: dict[str, Any]
    problem: str = ""


def read_tsv(paths: tuple[Path, ...], header: bool) -> Iterator[Row]:
    """Rows between tabs as GLUE has them: a quote is a character like any other."""
    (path,) = paths
    lines = ((number, line.split("\t")) for number, line in _numbered(path) if line.strip("\r"))
    stripped = ((number, [*cells[:-1], cells[-1].removesuffix("\r")]) for number, cells in lines)
    yield from _table(path, stripped, header)


def read_csv(paths: tuple[Path, ...], header: bool) -> Iterator[Row]:
    """Rows of comma-separated values, quoted where they hold commas, quotes or newlines."""
    (path,) = paths
    yield from _table(path, _parse_csv(path), header)


def _parse_csv(path: Path) -> Iterator[tuple[int, list[str] | str]]:
    lines = (f"{line}\n" for _, line in _numbered(path))
    reader = csv.reader(lines, strict=True)  # else a quote left open swallows the rest of the file
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, f"not valid CSV ({error})"
        else:
            if cells:
                yield number, cells


def _table(path: Path, rows: Iterator[tuple[int, list[str] | str]], header: bool) -> Iterator[Row]:
    """Names the cells by the header line, or "0", "1", … by their place in the line."""
    names: list[str] = []
    if header:
        _, first = next(rows, (1, ""))
        if isinstance(first, str):
            raise UserError(
                f"{path}:1: {first or 'no header line'}: set --config.data.header=False"
            )
        names = [name.strip() for name in first]
        if len(set(names)) < len(names):
            raise UserError(f"{path}:1: two columns have the same name ({', '.join(names)})")
    for number, cells in rows:
        where = f"{path}:{number}"
        if isinstance(cells, str):
            yield Row(where, {}, cells)
            continue
        names = names or [str(i) for i in range(len(cells))]
        if len(cells) == len(names):
            yield Row(where, dict(zip(names, cells, strict=True)))
        else:
            yield Row(where, {}, f"{len(cells)} columns instead of {len(names)}")


def read_jsonl(paths: tuple[Path, ...], header: bool) -> Iterator[Row]:
    """One JSON object a line."""
    (path,) = paths
    for number, line in _numbered(path):
        if line.strip():
            yield _object(f"{path}:{number}", line)


def _object(where: str, line: str) -> Row:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Row(where, {}, f"not valid JSON ({error})")
    if not isinstance(values, dict):
        return Row(where, {}, f"not a JSON object but {type(values).__name__}")
    return Row(where, values)


def read_parallel(paths: tuple[Path, ...], header: bool) -> Iterator[Row]:
    """Line n of the first file is the "source" and of the second the "target" of row n."""
    first, second = paths
    for source, target in zip_longest(_numbered(first), _numbered(second)):
        if source and target:
            values = {"source": source[1].rstrip("\r"), "target": target[1].rstrip("\r")}
            yield Row(f"{first}:{source[0]}", values)
        else:
            longer, shorter, line = (first, second, source) if source else (second, first, target)
            yield Row(f"{longer}:{line[0]}", {}, f"no line of {shorter} goes with it")


def read_squad(paths: tuple[Path, ...], header: bool) -> Iterator[Row]:
    """The questions of a file in the format of SQuAD 1.1 or 2.0, each with its context."""
    (path,) = paths
    try:
        articles = json.loads(b"".join(read_bytes(path)))["data"]
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        questions = [
            (paragraph["context"], qa) for paragraph in paragraphs for qa in paragraph["qas"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not in the format of SQuAD ({reason})") from error
    for number, (context, qa) in enumerate(questions, start=1):
        where = f"{path}: question {number}"
        try:
            answers = [
                {"text": answer["text"], "start": answer["answer_start"]}
                for answer in qa["answers"]
            ]
            values = {"id": qa["id"], "question": qa["question"], "context": context}
            impossible = bool(qa.get("is_impossible", False))
        except (KeyError, TypeError, AttributeError) as error:
            yield Row(where, {}, f"not in the format of SQuAD ({type(error).__name__}: {error})")
        else:
            yield Row(where, {**values, "answers": answers, "is_impossible": impossible})


FORMATS: dict[str, Callable[[tuple[Path, ...], bool], Iterator[Row]]] = {
    "tsv": read_tsv,
    "csv": read_csv,
    "jsonl": read_jsonl,
    "parallel": read_parallel,
    "squad": read_squad,
}


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    r"""The lines, counted from 1, without their "\n".

    Bytes that are not UTF-8 become lone surrogates, so that only their own row is bad.
    """
    rest, number = b"", 0
    for chunk in read_bytes(path):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            yield number, _decode(line, number)
    if rest:
        yield number + 1, _decode(rest, number + 1)


def _decode(line: bytes, number: int) -> str:
    text = line.decode("utf-8", "surrogateescape")
    return text.removeprefix("\ufeff") if number == 1 else text
