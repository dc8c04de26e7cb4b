#!/usr/bin/env bash
# Run the test suite on the newest JAX, which needs Python 3.12 or newer:
#     PYTHON=python3.13 scripts/test_newest.sh [pytest's arguments]
# Without PYTHON, on a bare Debian 13 that debootstrap makes in .newest (as root; 6 GB).
# Tests that compare with PyTorch need a CPU build for that Python: TORCH=torch-….whl.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${PYTHON:-}" ]; then
    root="$PWD/.newest"
    for command in debootstrap chroot mount; do
        if ! command -v $command >/dev/null || [ "$(id -u)" != 0 ]; then
            echo "error: set PYTHON to a Python of 3.12 or newer, or be root and install $command" >&2
            exit 2
        fi
    done
    if [ ! -x "$root/usr/bin/python3" ]; then
        debootstrap --variant=minbase --include=ca-certificates,git,python3-venv trixie "$root"
    fi
    trap 'umount "$root/proc" "$root/dev"' EXIT
    mount --bind /proc "$root/proc"
    mount --bind /dev "$root/dev"
    mkdir -p "$root/lm" "$root/etc/ssl/certs"
    for file in /etc/resolv.conf /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
        [ ! -e "$file" ] || cp "$file" "$root$file"
    done
    git ls-files -z | tar --null --files-from=- --create | tar --extract --directory="$root/lm"
    PYTHON=python3 chroot "$root" /lm/scripts/test_newest.sh "$@"
    exit
fi

[ -x .venv-newest/bin/python ] || "$PYTHON" -m venv .venv-newest
python=.venv-newest/bin/python
"$python" - "${TORCH:-}" >.venv-newest/requirements.txt <<'EOF'
import re
import sys
import tomllib

needs_torch = {"accelerate", "lm-eval", "torch", "transformers"}
with open("pyproject.toml", "rb") as file:
    wanted = tomllib.load(file)["project"]["optional-dependencies"]["test"]
for line in wanted:
    if sys.argv[1] or re.split(r"[^\w-]", line)[0] not in needs_torch:
        print(line)
EOF
"$python" -m pip install --quiet --disable-pip-version-check ${TORCH:+"$TORCH"} \
    --constraint scripts/constraints-newest.txt --requirement .venv-newest/requirements.txt --editable .
without_torch=()
if [ -z "${TORCH:-}" ]; then
    echo "without PyTorch: tests/interop and the test of lm-eval are left out"
    without_torch=(--ignore=tests/interop --ignore=tests/evaluation/test_harness.py)
fi
exec "$python" -m pytest -n auto --maxprocesses 8 "${without_torch[@]}" "$@"
