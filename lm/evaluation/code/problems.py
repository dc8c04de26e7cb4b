"""Programming problems with tests: files of HumanEval and MBPP.

HumanEval (Chen et al. 2021) is .jsonl(.gz), MBPP (Austin et al. 2021) JSON or .jsonl(.gz); rows are
recognized by their fields.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.data.files import read_text
from lm.data.records import read_jsonl_rows
from lm.errors import UserError
from lm.storage import parse_json


@dataclass(frozen=True)
class Problem:
    """Programming problem.

    Attributes:
        task_id: its name.
        prompt: text that a base model continues.
        beginning: part of the prompt that starts the program; "" if it is a comment.
        request: question for a chat model.
        stop: stop texts of a continuation.
        reference: completion that passes.
        tests: input of `remote_tests.run_statements`.
    """

    task_id: str
    prompt: str
    beginning: str
    request: str
    stop: tuple[str, ...]
    reference: str
    tests: dict[str, Any]

    def program(self, completion: str) -> str:
        """Return the program formed by a completion."""
        return self.beginning + completion


@dataclass(frozen=True)
class Completion:
    """Completion of a problem.

    Attributes:
        problem: the problem.
        text: text that forms the program; None if there was no room for it in the context.
        reply: complete reply of the model, if the text is a part of it.
    """

    problem: Problem
    text: str | None
    reply: str | None = None


def read_problems(file: Path) -> list[Problem]:
    """Read a file of problems.

    Raises:
        UserError: it cannot be read, is empty, or has a duplicate or invalid problem.
    """
    problems = [_problem(where, row) for where, row in _rows(file)]
    if not problems:
        raise UserError(f"{file}: no problems")
    seen: set[str] = set()
    for problem in problems:
        if problem.task_id in seen:
            raise UserError(f"{file}: the problem {problem.task_id} occurs twice")
        seen.add(problem.task_id)
    return problems


def read_completions(file: Path, problems: list[Problem]) -> list[Completion]:
    """Read a file of completions: .jsonl(.gz) with `task_id` and `completion`.

    Raises:
        UserError: it cannot be read, is empty, or has a row for an unknown problem.
    """
    by_name = {problem.task_id: problem for problem in problems}
    found = []
    for where, row in _rows(file):
        name, completion = str(row.get("task_id", "")), row.get("completion")
        if name not in by_name:
            raise UserError(f"{where}: the --code file has no problem {name!r}")
        found.append(Completion(by_name[name], _text(where, "completion", completion)))
    if not found:
        raise UserError(f"{file}: no completions")
    return found


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSON array or of a file's lines, with their places."""
    if not file.is_file():
        raise UserError(f"no file {file}")
    if file.name.removesuffix(".gz").endswith(".json"):
        rows = parse_json("".join(read_text(file)), file, list)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise UserError(f"{file}: entry {number} is not an object")
            yield f"{file}: entry {number}", row
        return
    for found in read_jsonl_rows(file):
        if found.problem:
            raise UserError(f"{found.where}: {found.problem}")
        yield str(found.where), dict(found.values)


def _problem(where: str, row: dict[str, Any]) -> Problem:
    for field, make in (("entry_point", _of_human_eval), ("test_list", _of_mbpp)):
        if field in row:
            return make(where, row)
    raise UserError(
        f"{where}: neither a HumanEval problem (entry_point) nor an MBPP problem (test_list)"
    )


def _text(where: str, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} is not text")
    return value


def _texts(where: str, row: dict[str, Any], field: str) -> list[str]:
    values = row.get(field, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f"{where}: {field!r} is not a list of texts")
    return values


def _of_human_eval(where: str, row: dict[str, Any]) -> Problem:
    prompt, entry, test = (_text(where, x, row.get(x)) for x in ("prompt", "entry_point", "test"))
    if "def check(" not in _compiled(test):
        raise UserError(f"{where}: the tests must be Python code that defines a function check")
    return Problem(
        str(row.get("task_id", where)),
        prompt,
        beginning=prompt,
        request=f"Complete this Python function. Answer with all of it, in one code block.\n\n"
        f"```python\n{prompt.rstrip()}\n```",
        stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\nassert", "\n@", "\n```"),
        reference=str(row.get("canonical_solution", "")),
        # Helper functions defined in the prompt are used by the tests.
        tests={
            "setup": _compiled(prompt, f"{prompt}\n    pass\n"),
            "tested": [entry],
            "statements": [test, f"check({entry})"],
        },
    )


def _compiled(*sources: str) -> str:
    """Return the first source that compiles, or ""."""
    for source in sources:
        try:
            compile(source, "prompt", "exec")
        except (SyntaxError, ValueError):
            continue
        return source
    return ""


def _of_mbpp(where: str, row: dict[str, Any]) -> Problem:
    field = "prompt" if "prompt" in row else "text"
    about = _text(where, field, row.get(field)).strip()
    tests = _texts(where, row, "test_list")
    if not tests:
        raise UserError(f"{where}: 'test_list' is empty")
    if not _compiled("\n".join(tests)):
        raise UserError(f"{where}: 'test_list' is not Python")
    setup = [*_texts(where, row, "test_imports"), str(row.get("test_setup_code", ""))]
    listed, reference = "\n".join(tests), str(row.get("code", ""))
    return Problem(
        str(row.get("task_id", where)),
        f'"""\n{about}\n{listed}\n"""\n',
        beginning="",
        request=f"{about} Answer with Python code in one code block. It shall pass these tests:\n\n"
        f"```python\n{listed}\n```",
        stop=("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n#", "\n```"),
        reference=reference,
        tests={"setup": "\n".join(setup), "tested": _defined(reference), "statements": tests},
    )


def _defined(source: str) -> list[str]:
    """Return the names of functions and classes defined by a program."""
    kinds = ast.FunctionDef, ast.ClassDef
    found = ast.parse(_compiled(source)).body
    return [node.name for node in found if isinstance(node, kinds)]
