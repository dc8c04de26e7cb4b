#!/usr/bin/env bash
# Train the default experiment on this machine's CPU, validate it, and generate some Python.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
workdir="${1:-runs/quickstart}"
export JAX_PLATFORMS=cpu

.venv/bin/lm train --config experiments/stdlib.py --workdir "$workdir"
echo
echo "A sample, continuing the start of a class:"
.venv/bin/lm generate --workdir "$workdir" --max_new_tokens 200 --temperature 0.7 --top_p 0.9 \
    --config.decode.repetition_penalty=1.1 --prompt 'class Reader:
    """Read a file."""

    def __init__(self, path, mode="r"):
        self.path = path
'
