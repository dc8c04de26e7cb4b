"""Compiled Jinja chat templates, with the extensions that Hugging Face models use.

The environment matches `apply_chat_template` in transformers 5: a sandbox, `{% break %}` and
`{% continue %}`, the filter `tojson` without HTML escapes, `raise_exception`, `strftime_now`, and
`{% generation %}` around what the assistant says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any, NoReturn

from lm.errors import UserError, missing_package

try:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError as error:
    raise missing_package("a chat template", "jinja2", "chat") from error


class _Generation(Extension):
    """`{% generation %}`: wraps its content in the variable `generation_marks`, if set."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [nodes.Name("generation_marks", "load")])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, marks: Any, caller: Any) -> str:
        before, after = marks if isinstance(marks, tuple) else ("", "")
        return f"{before}{caller()}{after}"


@dataclass(frozen=True)
class JinjaTemplate:
    """Compiled template.

    Attributes:
        source: Jinja source.
    """

    source: str

    @cached_property
    def _environment(self) -> Any:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise}
        return environment

    @cached_property
    def _compiled(self) -> Any:
        try:
            return self._environment.from_string(self.source)
        except TemplateError as error:
            raise UserError(f"the chat template: {_reason(error)}") from error

    def check(self) -> None:
        """Raise UserError if the source is not valid Jinja."""
        self._compiled  # noqa: B018  compiles it

    @cached_property
    def _tree(self) -> Any:
        return self._environment.parse(self.source)

    @property
    def marks_generation(self) -> bool:
        """True if the template marks the assistant's text with `{% generation %}`."""
        return any(name.name == "generation_marks" for name in self._tree.find_all(nodes.Name))

    @cached_property
    def constants(self) -> frozenset[str]:
        """String constants in its expressions."""
        return _texts([self._tree])

    @cached_property
    def literals(self) -> frozenset[str]:
        """String constants in its expressions, and literal text."""
        return self.constants | {part.data for part in self._tree.find_all(nodes.TemplateData)}

    @cached_property
    def inspected(self) -> frozenset[str]:
        """String constants that it compares values with, or passes to methods, tests or filters."""
        kinds: tuple[Any, ...] = (nodes.Compare, nodes.Test, nodes.Filter, nodes.Call)
        return _texts(self._tree.find_all(kinds))

    def render(self, variables: Mapping[str, Any], now: datetime) -> str:
        """Render the template.

        Args:
            variables: values by name, of plain JSON types.
            now: time for `strftime_now`.

        Raises:
            UserError: the template rejects the values.
        """
        try:
            return self._compiled.render(strftime_now=now.strftime, **variables)
        except UserError:
            raise
        except Exception as error:  # raised by the template's code
            raise UserError(f"the chat template: {_reason(error)}") from error


@lru_cache(maxsize=64)
def jinja_template(source: str) -> JinjaTemplate:
    """Compile a template; results are cached."""
    return JinjaTemplate(source)


def _texts(trees: Any) -> frozenset[str]:
    return frozenset(
        part.value
        for tree in trees
        for part in (
            *tree.find_all(nodes.Const),
            *([tree] if isinstance(tree, nodes.Const) else ()),
        )
        if isinstance(part.value, str)
    )


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
