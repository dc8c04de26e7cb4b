#!/usr/bin/env bash
# Run the whole test suite, in an environment of its own; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 "$@"
