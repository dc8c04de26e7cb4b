"""Pieces of the page as HTML text; whatever comes from a run is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from lm.tools.formatting import shown

TEMPLATE = Path(__file__).with_name("page.html")


class Cell(NamedTuple):
    """A cell: what is shown, what it is sorted by (a number, or the text), a dot's colour."""

    text: str
    value: float | None = None
    color: str = ""


def page(title: str, lead: str, sections: Iterable[str], n_tabs: int) -> str:
    """The whole document; `n_tabs` is the largest number of tabs in one group."""
    rules = "\n".join(
        f".tabs > input:nth-of-type({i}):checked ~ figure:nth-of-type({i}) {{ display: block; }}"
        for i in range(1, n_tabs + 1)
    )
    return Template(TEMPLATE.read_text()).substitute(
        title=escape(title), lead=escape(lead), body="\n".join(sections), tab_rules=rules
    )


def section(title: str, content: str) -> str:
    """A titled part of the page; nothing where there is no content."""
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>" if content else ""


def tiles(values: Mapping[str, str]) -> str:
    """Small cards of one figure each, by their captions."""
    cards = (
        f'<div class="card tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in values.items()
    )
    return f'<div class="tiles">{"".join(cards)}</div>'


def figures(items: Sequence[str]) -> str:
    """Cards side by side, as many as fit the width."""
    return f'<div class="figures">{"".join(items)}</div>' if items else ""


def figure(title: str, svg: str) -> str:
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<div class="card">{heading}<figure>{svg}</figure></div>'


def tabs(title: str, pictures: Mapping[str, str]) -> str:
    """A card that shows one of several pictures (SVG, by the names of their tabs)."""
    choices = "".join(
        f'<input type="radio" name="{escape(title)}" id="tab-{i}"{" checked" if not i else ""}>'
        f'<label for="tab-{i}">{escape(name)}</label>'
        for i, name in enumerate(pictures)
    )
    shown_ones = "".join(f"<figure>{svg}</figure>" for svg in pictures.values())
    return f'<div class="card tabs"><h3>{escape(title)}</h3>{choices}{shown_ones}</div>'


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], best: int | None = None) -> str:
    """A table that a click on a column's head sorts; the row `best` stands out."""
    heads = "".join(f'<th><button type="button">{escape(name)}</button></th>' for name in columns)
    body = "".join(
        f"<tr{' class=best' if i == best else ''}>{''.join(map(_cell, row))}</tr>\n"
        for i, row in enumerate(rows)
    )
    return (
        f'<div class="card wide"><table class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    key = "" if cell.value is None else f' data-value="{cell.value!r}"'
    if cell.text == shown(None):
        key = ' data-value=""'
    dot = f'<span class="dot" style="background:{cell.color}"></span>' if cell.color else ""
    return f'<td{key} title="{escape(cell.text)}">{dot}{escape(cell.text)}</td>'


def texts(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of long texts, which wrap; a column a key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    heads = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="text">{escape(shown(row.get(c)))}</td>' for c in columns)
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="card wide"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def bullets(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def folded(title: str, content: str) -> str:
    """Content that a click opens."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"
