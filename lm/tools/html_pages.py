"""Jinja templates of the HTML pages, which extend frame.html."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from lm.errors import missing_package
from lm.tools.formatting import printable

if TYPE_CHECKING:  # imported at run time only when a page is written
    import jinja2


def page_template(file: Path) -> jinja2.Template:
    """Load a template, which extends frame.html.

    Raises:
        UserError: the extra "report" is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise missing_package("the page", "jinja2", "report") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([file.parent, Path(__file__).parent]),
        autoescape=True,  # names, documents and texts of runs are not markup
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"digest": _digest, "printable": printable}
    return environment.get_template(file.name)


def _digest(script: str) -> str:
    """Return the CSP source of a script, so that no other script may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
