#!/usr/bin/env bash
# Make a corpus on a real Ray cluster of two nodes on this machine: the same files as without Ray.
set -euo pipefail
cd "$(dirname "$0")/.."
lm="${LM:-}" ray="${RAY:-}"
if [ -z "$lm" ]; then
    scripts/setup.sh corpus,ray
    lm="$PWD/.venv/bin/lm" ray="$PWD/.venv/bin/ray"
fi
port="${PORT:-6399}"
folder="$(mktemp -d)"
export RAY_AUTH_MODE=disabled RAY_ADDRESS="127.0.0.1:$port"
pids=()
finish() { for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done; }
trap finish EXIT

# --- two nodes of one core each
"$ray" start --head --block --port "$port" --num-cpus 1 --include-dashboard false \
    --disable-usage-stats --temp-dir "$folder/ray" >"$folder/head.log" 2>&1 &
pids+=($!)
sleep 10
"$ray" start --block --address "$RAY_ADDRESS" --num-cpus 1 >"$folder/worker.log" 2>&1 &
pids+=($!)
for _ in $(seq 60); do
    [ "$("$ray" list nodes 2>/dev/null | grep -c ALIVE)" != 2 ] || break
    sleep 1
done
"$ray" status

cat >"$folder/corpus.py" <<PYTHON
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.sources = {"python": {"source": "stdlib"}}
    config.rules = ("exact_duplicates", "near_duplicates")
    config.cluster = {"mem_per_cpu_gb": 1}
    return config
PYTHON
corpus=("$lm" corpus --config "$folder/corpus.py")
"${corpus[@]}" --output "$folder/local"
"${corpus[@]}" --output "$folder/ray_cluster" --executor ray --workers 2
diff -r "$folder/local" "$folder/ray_cluster"
echo "the same corpus from Ray"
finish
rm -r "$folder"
