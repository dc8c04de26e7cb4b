#!/usr/bin/env bash
# Create .venv and install this checkout with the given extras ("test", "tpu", "cuda12", …).
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-}"

python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python 3.11 or newer is needed; point the variable PYTHON at one" >&2
    exit 2
fi
if [ ! -x .venv/bin/pip ] && ! { "$python" -m venv .venv && [ -x .venv/bin/pip ]; }; then
    rm -rf .venv
    echo "error: $python cannot create a virtual environment (Debian: apt install python3-venv)" >&2
    exit 2
fi
mark=".venv/installed-${extras:-base}"
wanted="$(cat pyproject.toml scripts/constraints.txt | cksum)"
if [ "$(cat "$mark" 2>/dev/null)" != "$wanted" ]; then
    echo "installing into .venv …" >&2
    .venv/bin/pip install --quiet --disable-pip-version-check \
        --constraint scripts/constraints.txt --editable ".${extras:+[$extras]}"
    echo "$wanted" >"$mark"
fi
