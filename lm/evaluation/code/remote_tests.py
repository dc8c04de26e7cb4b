"""Tests of a program in another process: the script of the two confined processes of a run.

One process runs the program and answers calls of its functions; the other runs the tests, in which
a name that the program defines is a proxy. Only plain data cross: numbers, texts, and lists, sets
and dicts of them. So what a program does to its own interpreter (a patched `assert` helper, an
object that equals everything, `exit(0)`, a forged report) does not reach the tests. Standard
library only.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

_MOST_TEXT = 500  # characters of an error's message


def encode(value: Any, known: list[Any] | None = None) -> Any:
    """Return a value as JSON has it; what is no plain data is a number in the list `known`.

    Raises:
        TypeError: it is no plain data, and there is no list.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode(item, known) for item in value]
    for name, kind in _COLLECTIONS.items():
        if isinstance(value, kind):
            return {name: [encode(item, known) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, known), encode(v, known)] for k, v in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__: value.hex()}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, Remote):
        return {"object": value._number}
    if known is None:
        raise TypeError(f"a {type(value).__name__} cannot be passed to the program")
    known.append(value)
    return {"object": len(known) - 1}


# Views of a dict equal sets of the same items.
_COLLECTIONS: dict[str, Any] = {
    "tuple": tuple,
    "frozenset": frozenset,
    "set": (set, type({}.keys()), type({}.items())),
}
_FROM_ITEMS = {"tuple": tuple, "frozenset": frozenset, "set": set}
_FROM_HEX = {"bytes": bytes.fromhex, "bytearray": bytearray.fromhex}


def decode(node: Any, resolve: Any) -> Any:
    """Return the value that `encode` made a node of.

    Args:
        node: JSON value.
        resolve: function of the number of an object that is no plain data.
    """
    if isinstance(node, list):
        return [decode(item, resolve) for item in node]
    if not isinstance(node, dict):
        return node
    [(name, items)] = node.items()
    if name in _FROM_ITEMS:
        return _FROM_ITEMS[name](decode(item, resolve) for item in items)
    if name in _FROM_HEX:
        return _FROM_HEX[name](items)
    if name == "dict":
        return {decode(k, resolve): decode(v, resolve) for k, v in items}
    if name == "complex":
        return complex(*items)
    if name == "range":
        return range(*items)
    return resolve(int(node["object"]))


# --- the process of the program


class _Server:
    """Answers of the program's process to requests, one at a time."""

    def __init__(self, program: str):
        self._program = program
        self._module = types.ModuleType("program")
        self._objects: list[Any] = []

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the value of a request, and its arguments if they were changed; or the error."""
        try:
            node = request["arguments"]
            arguments, named = decode(node, self._objects.__getitem__)
            found = getattr(self, f"_{request['action']}")(*arguments, **named)
            answer = {"value": encode(found, self._objects)}
            after = encode([arguments, named], self._objects)
            return answer if after == node else answer | {"arguments": after}
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            return {"error": kinds, "message": str(error)[:_MOST_TEXT]}

    def _run(self) -> None:
        sys.modules["program"] = self._module
        exec(compile(self._program, "program", "exec"), self._module.__dict__)

    def _find(self, name: str) -> Any:
        if name not in self._module.__dict__:
            raise NameError(f"name {name!r} is not defined")
        return self._module.__dict__[name]

    def _call(self, function: Any, /, *arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    def _attribute(self, value: Any, name: str) -> Any:
        return getattr(value, name)

    def _items(self, value: Any) -> list[Any]:
        return list(value)


def serve(program: str, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    server = _Server(program)
    _send(answers, "ready")
    for line in requests:
        _send(answers, server.answer(json.loads(line)))


def _send(file: BinaryIO, value: Any) -> None:
    file.write(json.dumps(value).encode() + b"\n")
    file.flush()


# --- the process of the tests


class ProgramEnded(Exception):
    """End of the program's process, told apart from the program's own errors."""


class RemoteProgram:
    """RemoteProgram, seen from the process of the tests."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO):
        self._requests, self._answers = requests, answers

    def wait(self) -> None:
        """Wait until its process is confined, before it runs the program."""
        if self._answers.readline() != b'"ready"\n':
            raise ProgramEnded("the process of the program was not set up")

    def ask(self, action: str, *arguments: Any, **named: Any) -> Any:
        """Return the value of a request; a change of lists and dicts that were passed is made."""
        node = encode([arguments, named])
        try:
            _send(self._requests, {"action": action, "arguments": node})
            line = self._answers.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise ProgramEnded("the program ended its process")
        answer = json.loads(line)
        if "error" in answer:
            raise _error(answer["error"], str(answer.get("message")))
        resolve = self._remote
        if "arguments" in answer:
            after, after_named = decode(answer["arguments"], resolve)
            _change([*arguments, *named.values()], [*after, *after_named.values()])
        return decode(answer["value"], resolve)

    def _remote(self, number: int) -> Remote:
        return Remote(self, number)


def _change(before: list[Any], after: list[Any]) -> None:
    for old, new in zip(before, after, strict=True):
        if type(old) is type(new) and isinstance(old, list | dict | set | bytearray) and old != new:
            old.clear()
            old.extend(new) if isinstance(old, list | bytearray) else old.update(new)


def _error(kinds: list[str], message: str) -> Exception:
    """Return the exception of the first built-in kind that takes a message."""
    for name in kinds:
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(message)
            except TypeError:
                continue
    return RuntimeError(f"{kinds[0]}: {message}")


class Remote:
    """Function or object of the program that is no plain data; it equals only itself."""

    __slots__ = ("_number", "_program")

    def __init__(self, program: RemoteProgram, number: int):
        self._program, self._number = program, number

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._program.ask("call", self, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.ask("attribute", self, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._program.ask("items", self))


class _Names(dict):
    """Names of the tests: their own, built-in ones that are not tested, and the program's."""

    program: RemoteProgram
    tested: Sequence[str]

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) and name not in self.tested:
            raise KeyError(name)
        self[name] = value = self.program.ask("find", name)
        return value


def run_statements(tests: Mapping[str, Any], program: RemoteProgram) -> dict[str, Any]:
    """Run tests on the program.

    Args:
        tests: `setup`, a source whose names the tests use; `tested`, names that are the
            program's, even if the setup or Python has them; and `statements`, sources that
            raise unless they pass.
        program: the program.

    Returns:
        "passed", and "reason" if they did not.
    """
    names = _Names(__name__="tests")
    names.program, names.tested = program, tests["tested"]
    try:
        program.wait()
    except ProgramEnded as error:
        return {"passed": False, "reason": str(error), "unconfined": True}
    try:
        exec(tests["setup"], names)
        for name in tests["tested"]:
            names.pop(name, None)
        program.ask("run")
        for statement in tests["statements"]:
            exec(statement, names)
    except ProgramEnded as error:
        return {"passed": False, "reason": str(error), "ended": True}
    except BaseException as error:
        kind = type(error).__name__
        return {"passed": False, "reason": f"{kind}: {str(error)[:_MOST_TEXT]}".rstrip(": ")}
    return {"passed": True}


def run_role(wanted: Mapping[str, Any]) -> None:
    """Run one of the two processes."""
    sys.set_int_max_str_digits(0)
    incoming, outgoing = open(wanted["from"], "rb"), open(wanted["to"], "wb")  # noqa: SIM115
    report = os.fdopen(os.dup(1), "wb")
    os.dup2(0, 1)
    if wanted["tests"] is None:
        report.close()
        serve(wanted["program"], incoming, outgoing)
    else:
        _send(report, "ready")
        _send(report, run_statements(wanted["tests"], RemoteProgram(outgoing, incoming)))
        os._exit(0)


if __name__ == "__main__":
    run_role(globals()["wanted"])
