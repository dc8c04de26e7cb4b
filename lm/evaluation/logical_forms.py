"""Exact match of logical forms: lambda calculus in prefix notation (Zettlemoyer and Collins 2005).

Two forms match if they differ only in names of bound variables, or in order and repetition of the
arguments of `and` and `or`. The published evaluations do so too: Dong and Lapata
(2016; github.com/donglixp/lang2logic, utils/accuracy.lua, compute_tree_accuracy) sort the arguments
of `and` and `or`; Dong and Lapata (2018; github.com/donglixp/coarse2fine, logical/tree.py,
is_tree_eq) also rename variables, and sort those of =, next_to:t and five binders, which here keep
their order. There a superfluous closing bracket can pass unnoticed; here it is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lm.errors import UserError
from lm.evaluation.scores import alternatives

BINDERS = frozenset(("lambda", "exists", "argmax", "argmin", "max", "min", "count", "sum", "the"))
UNORDERED = frozenset(("and", "or"))
BOUND = "$"  # where a binder without names binds its variable

Form = Any  # form: a word, or a tuple of forms


def logical_form_match(predictions: Sequence[str], references: Sequence) -> dict[str, float]:
    """Return the percentage of predictions that match a reference; see the top of the module.

    Raises:
        UserError: the brackets of a reference do not match.
    """
    right = 0
    for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True), 1):
        try:
            accepted = [canonical_form(parse_form(text)) for text in alternatives(reference)]
        except ValueError as error:
            raise UserError(f"the reference of example {number}: {error}") from error
        with suppress(
            ValueError, RecursionError
        ):  # not a valid form, or nested too deeply: counts as wrong
            right += canonical_form(parse_form(prediction)) in accepted
    return {"logical_form_match": 100 * right / len(predictions)}


def parse_form(text: str) -> Form:
    """Parse "( lambda $0 e ( state:t $0 ) )" into nested tuples; several forms are one tuple.

    Raises:
        ValueError: the brackets do not match.
    """
    open_forms: list[list[Form]] = [[]]
    for word in text.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            open_forms.append([])
        elif word != ")":
            open_forms[-1].append(word)
        elif len(open_forms) > 1:
            form = tuple(open_forms.pop())
            open_forms[-1].append(form)
        else:
            raise ValueError(f"unmatched closing bracket in {text!r}")
    if len(open_forms) > 1:
        raise ValueError(f"unclosed bracket in {text!r}")
    (forms,) = open_forms
    return forms[0] if len(forms) == 1 else tuple(forms)


def canonical_form(form: Form) -> Form:
    """Return a form without names, with the arguments of `and` and `or` sorted and distinct."""
    return _sorted(without_names(form))


def without_names(form: Form, bound: tuple[str, ...] = ()) -> Form:
    """Return a form with bound variables as numbers, 0 for the innermost (de Bruijn 1972).

    Args:
        form: parsed form.
        bound: variables bound around it, innermost first.
    """
    if isinstance(form, str):
        return bound.index(form) if form in bound else form
    if not is_binder(form):
        return tuple(without_names(part, bound) for part in form)
    inside = (form[1], *bound)
    return (form[0], BOUND, *(without_names(part, inside) for part in form[2:]))


def is_binder(form: Form) -> bool:
    """Return whether a form, such as ( argmax $0 … ), binds the variable after its operator."""
    starts = isinstance(form, tuple) and len(form) > 1 and form[0] in BINDERS
    return starts and isinstance(form[1], str) and form[1].startswith("$")


def _sorted(form: Form) -> Form:
    if not isinstance(form, tuple):
        return form
    operator, arguments = form[:1], [_sorted(part) for part in form[1:]]
    if operator and operator[0] in UNORDERED:
        arguments = sorted(set(arguments), key=repr)
    return (*map(_sorted, operator), *arguments)
