"""Tests of a program that runs in another process: script of both confined processes.

One process runs the program and answers calls to its functions; the other runs the tests, in which
names that the program defines are proxies. Only plain data are exchanged: numbers, texts, and
lists, sets and dicts of them. So nothing that a program does to its own interpreter (a patched
`assert` helper, an object that equals everything, `exit(0)`, a forged report) affects the tests.
Standard library only.
"""

from __future__ import annotations

import builtins
import importlib
import json
import operator
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

_MOST_TEXT = 500  # maximum characters of an error message


def encode(value: Any, known: list[Any]) -> Any:
    """Convert a value to JSON; other objects become indices into the list `known`."""
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
    if (kind := f"{type(value).__module__}.{type(value).__name__}") in _WRITTEN:
        return {"written": [kind, str(value)]}
    if isinstance(value, Remote):
        return {"yours": value._number}
    known.append(value)
    return {"mine": len(known) - 1}


# Views of a dict equal sets of the same items.
_COLLECTIONS: dict[str, Any] = {
    "tuple": tuple,
    "frozenset": frozenset,
    "set": (set, type({}.keys()), type({}.items())),
}
# Types that can be reconstructed from their text.
_WRITTEN = (
    *("decimal.Decimal", "fractions.Fraction", "uuid.UUID"),
    *("datetime.date", "datetime.datetime", "datetime.time"),
)
_FROM_ITEMS = {"tuple": tuple, "frozenset": frozenset, "set": set}
_FROM_HEX = {"bytes": bytes.fromhex, "bytearray": bytearray.fromhex}


def decode(node: Any, known: list[Any], remote: Callable[[int], Any]) -> Any:
    """Restore the value of a node made by `encode`.

    Args:
        node: JSON value.
        known: objects of this process that the other one refers to by index.
        remote: creates the proxy of an object of the other process.
    """

    def value(node: Any) -> Any:
        if isinstance(node, list):
            return [value(item) for item in node]
        if not isinstance(node, dict):
            return node
        [(name, items)] = node.items()
        if name in _FROM_ITEMS:
            return _FROM_ITEMS[name](value(item) for item in items)
        if name in _FROM_HEX:
            return _FROM_HEX[name](items)
        if name == "dict":
            return {value(k): value(v) for k, v in items}
        if name == "complex":
            return complex(*items)
        if name == "range":
            return range(*items)
        if name == "written" and items[0] in _WRITTEN:
            module, _, kind = items[0].partition(".")
            found = getattr(importlib.import_module(module), kind)
            return getattr(found, "fromisoformat", found)(items[1])
        return known[int(items)] if name == "yours" else remote(int(node["mine"]))

    return value(node)


# --- process of the program


class _Server:
    """Server in the program's process; handles requests one at a time.

    Args:
        program: source of the program.
        requests: request pipe.
        answers: pipe of answers, and of calls to functions that the tests passed.
    """

    def __init__(self, program: str, requests: BinaryIO, answers: BinaryIO):
        self._program, self._requests, self._answers = program, requests, answers
        self._module = types.ModuleType("program")
        self._objects: list[Any] = []
        self._actions: dict[str, Any] = {
            "run": self._run,
            "find": self._find,
            "call": _call,
            "attribute": getattr,
            "items": list,
            "length": len,
            "text": str,
            "truth": bool,
            "item": operator.getitem,
            "equal": operator.eq,
        }

    def serve(self) -> None:
        """Handle requests until there are no more."""
        while line := self._requests.readline():
            _send(self._answers, self._answer(json.loads(line)))

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the value of a request and its modified arguments; or the error."""
        try:
            node = request["arguments"]
            arguments, named = decode(node, self._objects, self._remote)
            found = self._actions[request["action"]](*arguments, **named)
            answer = {"value": encode(found, self._objects)}
            after = encode([arguments, named], self._objects)
            return answer if after == node else answer | {"arguments": after}
        except BaseException as error:
            return _failure(error)

    def _remote(self, number: int) -> Any:
        """Return a function that calls one of the tests' functions."""

        def call(*arguments: Any, **named: Any) -> Any:
            node = encode([arguments, named], self._objects)
            _send(self._answers, {"call": number, "arguments": node})
            while "action" in (message := json.loads(self._requests.readline())):
                _send(self._answers, self._answer(message))  # the function calls the program
            return _value(message, self._objects, self._remote)

        return call

    def _run(self) -> None:
        sys.modules["program"] = self._module
        exec(compile(self._program, "program", "exec"), self._module.__dict__)

    def _find(self, name: str) -> Any:
        if name not in self._module.__dict__:
            raise NameError(f"name {name!r} is not defined")
        return self._module.__dict__[name]


def _call(function: Any, /, *arguments: Any, **named: Any) -> Any:
    return function(*arguments, **named)


def _failure(error: BaseException) -> dict[str, Any]:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return {"error": kinds, "message": str(error)[:_MOST_TEXT]}


def _value(answer: dict[str, Any], known: list[Any], remote: Callable[[int], Any]) -> Any:
    """Return the value of an answer, or raise its error as its first built-in type."""
    if "error" not in answer:
        return decode(answer["value"], known, remote)
    kinds, message = answer["error"], str(answer.get("message"))
    for name in kinds:
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
            raise kind.__new__(kind, message)
    raise RuntimeError(f"{kinds[0]}: {message}")


def _send(file: BinaryIO, value: Any) -> None:
    file.write(json.dumps(value).encode() + b"\n")
    file.flush()


# --- process of the tests


class ProgramEnded(Exception):
    """End of the program's process, as distinct from an error of the program."""


class RemoteProgram:
    """Proxy of the program, in the process of the tests."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO):
        self._requests, self._answers = requests, answers
        self._passed: list[Any] = []  # functions and objects passed by the tests

    def wait(self) -> None:
        """Wait until the program's process is confined, before it runs the program."""
        if self._answers.readline() != b'"ready"\n':
            raise ProgramEnded("the process of the program was not set up")

    def ask(self, action: str, *arguments: Any, **named: Any) -> Any:
        """Return the value of a request; also apply changes to lists and dicts passed to it."""
        node = encode([arguments, named], self._passed)
        answer = self._exchange({"action": action, "arguments": node})
        while "call" in answer:
            answer = self._exchange(self._called(answer))
        if "arguments" in answer:
            after, after_named = decode(answer["arguments"], self._passed, self._remote)
            _change([*arguments, *named.values()], [*after, *after_named.values()])
        return _value(answer, self._passed, self._remote)

    def _exchange(self, message: Any) -> dict[str, Any]:
        try:
            _send(self._requests, message)
            line = self._answers.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise ProgramEnded("the program exited")
        return json.loads(line)

    def _called(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a call to a function that the tests passed."""
        try:
            arguments, named = decode(request["arguments"], self._passed, self._remote)
            found = self._passed[int(request["call"])](*arguments, **named)
            return {"value": encode(found, self._passed)}
        except ProgramEnded:
            raise
        except Exception as error:
            return _failure(error)

    def _remote(self, number: int) -> Remote:
        return Remote(self, number)


def _change(before: list[Any], after: list[Any]) -> None:
    for old, new in zip(before, after, strict=True):
        if type(old) is type(new) and isinstance(old, list | dict | set | bytearray) and old != new:
            old.clear()
            old.extend(new) if isinstance(old, list | bytearray) else old.update(new)


class Remote:
    """Proxy of a function or object of the program that is not plain data.

    It equals only objects of the program and supports no other operators, so that test results are
    decided by plain data.
    """

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

    def __len__(self) -> int:
        return self._program.ask("length", self)

    def __getitem__(self, index: Any) -> Any:
        return self._program.ask("item", self, index)

    def __str__(self) -> str:
        return self._program.ask("text", self)

    def __bool__(self) -> bool:
        return self._program.ask("truth", self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self._program.ask("equal", self, other) is True

    __hash__ = object.__hash__


class _Names(dict):
    """Namespace of the tests: their own names, untested built-ins, and the program's names."""

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
        tests: `setup`, source whose names the tests use; `tested`, names taken from the program
            even if the setup or Python defines them; and `statements`, sources that raise unless
            they pass.
        program: the program.

    Returns:
        "passed", and "reason" if they failed.
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
        _send(outgoing, "ready")
        _Server(wanted["program"], incoming, outgoing).serve()
    else:
        _send(report, "ready")
        _send(report, run_statements(wanted["tests"], RemoteProgram(outgoing, incoming)))
        os._exit(0)


if __name__ == "__main__":
    run_role(globals()["wanted"])
