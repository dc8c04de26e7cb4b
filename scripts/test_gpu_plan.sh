#!/usr/bin/env bash
# Install JAX's CUDA compiler (5.5 GB) beside the tests, in .venv, and run the planner's GPU tests.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test,cuda12
exec .venv/bin/python -m pytest tests/tools/planning/test_gpu.py "$@"
