"""Folder names derived from arbitrary names."""

from __future__ import annotations

import hashlib
import re


def short_name(name: str) -> str:
    """Convert a name to a safe folder name: letters, digits and `._=+-`, at most 80 characters.

    A name that has to change gets the start of its digest as a suffix, so that names stay distinct.
    """
    safe = re.sub(r"[^\w.=+-]", "_", name, flags=re.ASCII)[:64].lstrip(".-")
    if safe and safe == name:
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{safe}-{digest}".lstrip("-")
