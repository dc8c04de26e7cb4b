"""Names of folders that are made of names of other things."""

from __future__ import annotations

import hashlib
import re


def short_name(name: str) -> str:
    """Return a name as a folder's: letters, digits and `._=+-`, at most 80 of them.

    A name that has to change gets the start of its digest, so that two names stay two folders.
    """
    safe = re.sub(r"[^\w.=+-]", "_", name, flags=re.ASCII)[:64].lstrip(".-")
    if safe and safe == name:
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{safe}-{digest}".lstrip("-")
